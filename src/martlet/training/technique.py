"""What every technique that trains shares: the fields of a schedule, and the loop that they are given to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.data.examples import Examples
from martlet.training.objective import Objective

PRECISIONS = ("auto", "f32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Training(Technique):
    """Fields and order of work of every technique that trains the model as it stands.

    AdamW, with a learning rate that warms up and falls along a half cosine. Order and changes of the images are drawn
    from the seed, so that a run that was stopped goes on to the same weights.

    Args:
        epochs: how often every image is seen.
        minutes: at most this long: a few steps are timed, and the schedule is cut to what fits. 0 is no limit.
        batch: images in a step, of all processes together.
        rate: the highest learning rate.
        weight_decay: of parameters with more than one dimension.
        warmup: the share of the steps in which the rate rises, from 0 to 1.
        clip: the greatest norm of a gradient; 0 doesn't limit it.
        ema: how slowly a running mean of the weights, which is what is given, follows: 0.9999 for long training; 0
            gives the last weights.
        precision: of matrix products: `f32`, `bf16`, or `auto`, which is bf16 on an accelerator and f32 on a CPU.
        augment: how images are changed: `none`; `crop`, moved by up to an eighth and mirrored; or timm's name of a
            policy, as `rand-m9-mstd0.5-inc1`, with a random resized crop.
        erase: with timm's policies, the probability of a rectangle of noise.
        mixup: the parameter of the distribution of shares when images of a batch are blended (timm); 0 blends none.
        cutmix: the same of the share that is cut out of another image; with both, a step takes one or the other.
        smoothing: the share of a label that all classes get evenly.
        patience: after how many epochs without a smaller loss, on images that are held back, to stop, with the weights
            of the smallest. 0 goes on to the end and gives the last.
    """

    stage: ClassVar[Stage] = Stage.ANY
    needs_images: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    epochs: float = 3.0
    minutes: float = 0.0
    batch: int = 128
    rate: float = 5e-4
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "auto"
    augment: str = "crop"
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    patience: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("epochs", 0), ("rate", 0), ("batch", 0)):
            if not getattr(self, name) > lowest:
                raise RecipeError(f"{self.name}: {name} is {getattr(self, name)}; it has to be more than {lowest}")
        for name in ("minutes", "weight_decay", "clip", "mixup", "cutmix", "patience"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"{self.name}: {name} is {getattr(self, name)}; it can't be less than 0")
        for name in ("warmup", "ema", "erase", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{self.name}: {name} is {getattr(self, name)}; it can be 0, or more and less than 1")
        if self.precision not in PRECISIONS:
            raise RecipeError(f"{self.name}: precision is {self.precision!r}; it can be {', '.join(PRECISIONS)}")
        if (self.mixup or self.cutmix) and self.batch % 2:
            raise RecipeError(f"{self.name}: batch is {self.batch}; images are mixed in pairs, so it has to be even")

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        from martlet.training.loop import train_

        examples = self.examples(model, context)
        return train_(model, self.objective(model, context), examples, self, context)

    def examples(self, model: Model, context: Context) -> Examples:
        """What is learned from: images to train on, or those of the calibration where there are none.

        Raises:
            RecipeError: there are neither, or no labels where these are learned from.
        """
        found = context.training
        if found is None:
            found = Examples.unlabelled(context.calibration(self), model.preprocess)
        if self.needs_labels and found.labels is None:
            raise RecipeError(f"{self.name} learns from labels, and {found.source} has none; give some with --train")
        return found

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        """The structure is as it was; values follow from the artifact's tensors."""

    def policy(self, step: int, steps: int) -> str:
        """How images are changed in a step, from 0, of so many: a value of `augment`."""
        return self.augment

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """What takes the steps, of parameters in groups with `lr` and `weight_decay`."""
        return torch.optim.AdamW(groups, fused=True)

    @abstractmethod
    def objective(self, model: Model, context: Context) -> Objective:
        """What is made small. The model isn't changed before the loop asks the objective to."""


@dataclass(frozen=True, kw_only=True)
class Leading(Technique):
    """A pass that leaves the model as it is, and changes what the pass right behind it, which trains, learns from."""

    stage: ClassVar[Stage] = Stage.MODULE

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        """There is nothing of it in the model."""

    @abstractmethod
    def around(
        self, objective: Objective, record: Mapping[str, Any], model: Model, settings: Training, context: Context
    ) -> Objective:
        """What is made small in place of an objective. record: what `apply_` returned."""
