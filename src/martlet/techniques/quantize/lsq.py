"""lsq: weights, steps of the grids and all that isn't rounded are trained while everything is rounded as it will be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.functional.distillation import divergence
from martlet.graph.trace import trace
from martlet.nn.straight_through import Learned, LearnedWeight, Passing, learned
from martlet.training.objective import RATE, Batch, Objective, Teacher
from martlet.training.technique import Training
from martlet.vit.sparsity import Sparsity

STEP_RATE = 0.5
"""Of a step's learning rate, over that of weights. Steps are learned relative to what they were."""


@dataclass(frozen=True, kw_only=True)
class LSQ(Training):
    """Train a quantized model as it is rounded, to give a teacher's logits: quantization-aware training.

    Comes after what quantizes (`uniform | lsq`, `martlet | lsq`, `gptq | lsq`), and keeps its grids: weights of 2 to 7
    bits move in floating point and are rounded whenever they are used, and their steps, the scales of activations,
    biases, norms and whatever isn't rounded train along. Weights of 8 bits and zero points stay, and so do zeros that
    `sparsegpt` or `wanda` made.

    Shape: none changes.
    Needs: images; labels aren't used. A teacher of the same classes: the untouched model if none is given.
    Cost: about five inferences a step and image, in floating point; nothing at run time.
    Paper: Esser et al., Learned Step Size Quantization, 2020, arXiv 1902.08153: gradients and their scale, held against
        others' code of it.
    Differs: grids have zero points and a step for each channel or group where the quantization before has them, and
        begin as it chose them. A step is learned relative to what it was, because AdamW, unlike the paper's SGD, takes
        steps of the same length whatever the gradient's scale; that scale, which then only weighs in where gradients
        are clipped, is taken for weights alone, with q = 2^(bits - 1), one more than the paper's. The loss is the
        teacher's logits, not labels.
    Raises: RecipeError for a setting out of range, without images, where nothing is rounded, or where the teacher is
        too; UsageError for a teacher with other classes; and as the loop does.
    """

    name: ClassVar[str] = "lsq"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "train a quantized model as it is rounded: weights, steps and the rest"
    paper: ClassVar[str] = "Esser et al., Learned Step Size Quantization, 2020, arXiv 1902.08153"

    def check(self, model: Model) -> None:
        if not any(learned(module) is not None for module in model.module.modules()):
            raise RecipeError(
                f"lsq: nothing of {model.name} is rounded yet; put what quantizes before it: uniform | lsq"
            )

    def objective(self, model: Model, context: Context) -> Objective:
        teacher = context.teacher
        assert teacher is not None
        if teacher.rounded:
            raise RecipeError(f"lsq: the teacher {teacher.name} is rounded itself; give another, as it was before")
        graph = teacher.stage is Stage.GRAPH
        untouched = teacher.module if graph else trace(teacher.copy().module, teacher.preprocess.size)
        return Rounded(Teacher(teacher, model), dict(untouched.named_parameters()), pattern(model))


def pattern(model: Model) -> tuple[int, int, int] | None:
    """That of the zeros which a technique before has left."""
    found = (step.technique for step in model.steps if isinstance(step.technique, Sparsity))
    return next(((its.zeros, its.of, its.run) for its in found if its.zeros), None)


class Rounded(Objective):
    """weights: of the model before anything was rounded, by name, to begin from where the shape is the same.
    sparsity: zeros, of how many, and how many together, of weights that are so sparse; they stay zero.
    """

    def __init__(
        self, teacher: Teacher, weights: dict[str, nn.Parameter], sparsity: tuple[int, int, int] | None = None
    ) -> None:
        super().__init__()
        self.teacher, self._weights, self._sparsity = teacher, weights, sparsity
        self.layers: dict[str, Learned] = {}

    def prepare_(self, student: nn.Module) -> None:
        assert isinstance(student, GraphModule)
        for name, module in list(student.named_modules()):
            start = self._weights.get(name.removesuffix("_quantizer"))
            device = next((b.device for b in module.buffers()), None)
            layer = learned(module, None if start is None else start.to(device))
            if layer is not None:
                if self._sparsity and isinstance(layer, LearnedWeight):
                    layer.make_zero_(*self._sparsity)
                self.layers[name] = layer.to(device)
                student.set_submodule(name, layer)

    def finish_(self, student: nn.Module) -> None:
        assert isinstance(student, GraphModule)
        for name, layer in self.layers.items():
            its = student.get_submodule(name)
            assert isinstance(its, type(layer))
            its.finish_()
            student.set_submodule(name, its.quantizer)

    def groups(self, student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        student.requires_grad_(True)
        steps = [layer.factor for layer in self.layers.values() if not isinstance(layer, Passing)]
        weights = [layer.weight for layer in self.layers.values() if isinstance(layer, LearnedWeight)]
        apart = {id(parameter) for parameter in (*steps, *weights)}
        others = [parameter for parameter in student.parameters() if id(parameter) not in apart]
        groups = [
            {"params": weights, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
            {"params": steps, "weight_decay": 0.0, RATE: STEP_RATE},
        ]
        return [group for group in groups if group["params"]]

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        return self.judge(student(batch.images), batch)

    def judge(self, logits: Tensor, batch: Batch) -> Tensor:
        return divergence(logits, self.teacher(batch.images))
