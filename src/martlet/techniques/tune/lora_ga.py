"""lora_ga: LoRA that begins where its first step is the one that training all weights would take."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.training.low_rank import LowRank
from martlet.training.objective import Objective
from martlet.training.tuning import Tuning, classifiers, linears, peft


@dataclass(frozen=True, kw_only=True)
class LoraGa(Tuning):
    """Learn a task as `lora` does, from updates that begin in the directions of the weights' own gradient.

    The factors are singular vectors of the gradient on a few images; what they multiply to is taken off the weight, so
    the model begins as it was. Loss then falls about as fast as when all weights are trained. A new classifier has
    nothing to say of the weights yet: let it learn first, `probe | lora_ga`.

    Args:
        rank: of each update.
        alpha: the update is scaled by alpha / √rank.
        gamma: the larger, the smaller the factors begin (the paper's γ).
        images: how many the gradient is taken of.

    Shape: none changes.
    Needs: images with labels (`--train`); the peft library.
    Cost: as `lora`, and a backward pass of all weights for the images; nothing at run time.
    Paper: Wang et al., LoRA-GA, 2024, arXiv 2407.05000; by the peft library.
    Differs: a decomposition by random projections, as peft has it and the official code.
    Raises: RecipeError for a setting out of range, images without labels, or Linears too narrow for the rank;
        UsageError without peft; and as the loop does.
    """

    name: ClassVar[str] = "lora_ga"
    summary: ClassVar[str] = "learn a task as lora does, from the directions of the weights' gradient"
    paper: ClassVar[str] = "Wang et al., LoRA-GA, 2024, arXiv 2407.05000"

    rank: int = 8
    alpha: float = 16.0
    gamma: int = 16
    images: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "alpha", "gamma", "images"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"lora_ga: {name} is {getattr(self, name)}; it has to be more than 0")

    def check(self, model: Model) -> None:
        peft("lora_ga")
        for name, linear in linears(model.module, model.num_classes, "lora_ga").items():
            if min(linear.weight.shape) < 2 * self.rank:
                raise RecipeError(
                    f"lora_ga: {name} has {min(linear.weight.shape)} features and takes {2 * self.rank} directions; "
                    f"set rank: {max(min(linear.weight.shape) // 2, 1)}"
                )

    def objective(self, model: Model, context: Context) -> Objective:
        library, examples = peft("lora_ga"), context.training
        assert examples is not None  # for labels are needed
        heads = [*classifiers(model.module, model.num_classes, "lora_ga")]
        config = library.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            use_rslora=True,
            target_modules=[*linears(model.module, model.num_classes, "lora_ga")],
            exclude_modules=heads,
            init_lora_weights="lora_ga",
            lora_ga_config=library.LoraGAConfig(stable_gamma=self.gamma),
        )
        few, _ = examples.split(min(self.images, len(examples)), context.seed)

        def before(student: nn.Module, config: Any) -> None:
            from peft.tuners.lora.loraga import preprocess_loraga

            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook is firing")  # of peft, for frozen embeddings
                preprocess_loraga(student, config, lambda: _gradients(student, few, self.batch))

        return LowRank(self.smoothing, heads, config, before)


def _gradients(student: nn.Module, examples: Examples, batch: int) -> None:
    """Of the labels' cross-entropy, added up in the weights."""
    device = next(student.parameters()).device
    labels = examples.labels
    assert labels is not None
    for indices in np.array_split(np.arange(len(examples)), -(-len(examples) // batch)):
        images = examples.normalize(examples.batch(indices, indices).to(device))
        loss = functional.cross_entropy(student(images).float(), labels[torch.from_numpy(indices)].to(device))
        loss.backward()
