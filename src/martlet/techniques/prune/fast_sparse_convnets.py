"""fast_sparse_convnets: most weights of 1 × 1 convolutions become zero in training, and a kernel skips them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.functional.structure.sparsity import gradual, least
from martlet.nn.sparse import pointwise
from martlet.training.objective import Batch, Objective, Taught, Teacher
from martlet.training.technique import Training

REACHED = 0.5
"""The share of the steps in which zeros come; in the others what is left learns to do without."""


@dataclass(frozen=True, kw_only=True)
class FastSparseConvNets(Training):
    """Train a convolutional network or hybrid while the smallest weights of its 1 × 1 convolutions become zero.

    Zeros come quickly at first and ever more slowly until half of the training is over, and stay zero in every training
    after it. Depthwise and larger convolutions, those of a single place (squeeze and excitation), and Linears stay.
    The engine `torch` multiplies what isn't zero, from `sparsity` 0.8 on in float32. OpenVINO and ONNX Runtime multiply
    zeros as all else, and take a whole network faster so than `torch` does without them (docs/kernels.md): this is for
    where PyTorch is what runs, or a runtime with kernels of its own.

    Args:
        sparsity: the share of the weights of each such convolution that becomes zero. At 0.9 the kernel is twice as
            fast as the dense one, and at 0.8 about as fast.

    Shape: none changes.
    Needs: images; labels aren't used. A teacher of the same classes: the untouched model if none is given.
    Cost: about four inferences a step and image, in floating point; at run time on the engine `torch`, at 0.9, about
        half of the time of such convolutions and all of what the rest takes: MobileNets are 1.1 to 1.3 times as fast.
        Small networks lose much accuracy in a short training (docs/learning.md).
    Paper: Elsen et al., Fast Sparse ConvNets, 2020, arXiv 1911.09723, from its abstract and official code; the schedule
        is equation 1 of Zhu and Gupta, To prune, or not to prune, 2017, arXiv 1710.01878.
    Differs: the kernel is PyTorch's product of compressed sparse rows, on x86 MKL's, where the paper has its own for
        ARM and WebAssembly. The model is trained already, and learns from the teacher's logits, where the paper trains
        from random weights on labels. Written without the papers' text at hand.
    Raises: RecipeError for a setting out of range, a model without such convolutions, or without images; UsageError for
        a teacher with other classes; and as the loop does.
    """

    name: ClassVar[str] = "fast_sparse_convnets"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "train while most weights of 1 × 1 convolutions become zero, which a kernel skips"
    paper: ClassVar[str] = "Elsen et al., Fast Sparse ConvNets, 2020, arXiv 1911.09723"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULE, Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})

    leaves_zeros: ClassVar[bool] = True

    sparsity: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise RecipeError(
                f"{self.name}: sparsity is the share of weights that become zero, from 0 to less than 1, not "
                f"{self.sparsity}"
            )
        if self.patience:
            raise RecipeError(f"{self.name}: weights of an earlier epoch would have fewer zeros; leave patience at 0")

    def check(self, model: Model) -> None:
        if not pointwise(model.module, model.preprocess.size):
            raise RecipeError(
                f"{self.name}: {model.name} has no 1 × 1 convolution; sparsegpt makes weights of transformers zero"
            )

    def objective(self, model: Model, context: Context) -> Objective:
        assert context.teacher is not None
        layers = [*pointwise(model.module, model.preprocess.size)]
        return Sparser(Teacher(context.teacher, model), layers, self.sparsity)


class Sparser(Taught):
    """The teacher's logits, learned with ever fewer weights of some layers; the others rest, at what they were."""

    def __init__(self, teacher: Teacher, layers: list[str], sparsity: float) -> None:
        super().__init__(teacher)
        self.layers, self.sparsity = layers, sparsity

    def prepare_(self, student: nn.Module) -> None:
        for name in self.layers:
            layer = student.get_submodule(name)
            assert isinstance(layer, nn.Conv2d)
            parametrize.register_parametrization(layer, "weight", Masked(layer.weight))

    def finish_(self, student: nn.Module) -> None:
        for name in self.layers:
            parametrize.remove_parametrizations(student.get_submodule(name), "weight", leave_parametrized=True)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        share = gradual(self.sparsity, (batch.step + 1) / (REACHED * batch.steps))
        for name in self.layers:
            masked: Any = student.get_submodule(name).parametrizations
            masked.weight[0].mask.copy_(~least(masked.weight.original.detach(), share))
        return super().loss(student, batch)


class Masked(nn.Module):
    """What stands in a weight's place while it trains: the weight times a mask, which is saved with the model."""

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))  # of which a running mean is the last

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask
