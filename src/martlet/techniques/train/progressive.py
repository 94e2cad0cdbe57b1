"""progressive: images grow while the model trains, and dropout and changes of images with them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.training.objective import Batch, CrossEntropy, Objective
from martlet.training.technique import Training

MAGNITUDE = re.compile(r"(rand-m)(\d+)")


@dataclass(frozen=True, kw_only=True)
class Progressive(Training):
    """Train all weights on labels, on small images at first, and on larger ones stage by stage.

    Small images take a fraction of the time; and because a model overfits them less, they get less dropout and weaker
    changes, which grow along. For models that take images of any size: convolutions, hybrids, and transformers that
    were made so (`--model-kwargs dynamic_img_size=true` in timm).

    Args:
        smallest: the side of the first stage's images, in pixels; 0 is half of the model's.
        stages: of as many steps each; the last has the model's own size.
        multiple: sides are rounded to multiples of so many pixels.
        dropout: of the last stage, in the model's Dropouts, from none in the first; 0 leaves them as they are.

    Magnitudes of a policy (`augment: rand-m15-…`) grow from a third of what is given to all of it.

    Shape: none changes but that of images.
    Needs: images with labels (`--train`).
    Cost: less than `finetune`: with half the side and four stages, about 60 % of its products; nothing at run time.
    Paper: Tan and Le, EfficientNetV2, 2021, arXiv 2104.00298.
    Differs: mixup isn't part of what grows. Images are made smaller after they were changed.
        The text wasn't read again.
    Raises: RecipeError for a setting out of range, images without labels, or a model that takes one size alone; and as
        the loop does.
    """

    name: ClassVar[str] = "progressive"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "train on labels, on images that grow stage by stage"
    paper: ClassVar[str] = "Tan and Le, EfficientNetV2, 2021, arXiv 2104.00298"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    needs_labels: ClassVar[bool] = True

    smallest: int = 0
    stages: int = 4
    multiple: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("smallest", 0), ("stages", 2), ("multiple", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"progressive: {name} is {getattr(self, name)}; it can't be less than {least}")
        if self.minutes:
            raise RecipeError("progressive: its first steps don't tell what later ones take; set epochs and no minutes")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"progressive: dropout is {self.dropout}; it can be 0, or more and less than 1")

    def sides(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each stage's images, in pixels."""
        first = self.smallest / max(size) if self.smallest else 0.5
        shares = [first + (1 - first) * i / (self.stages - 1) for i in range(self.stages)]
        small = [tuple(max(round(share * s / self.multiple), 1) * self.multiple for s in size) for share in shares[:-1]]
        return [*small, size]  # type: ignore[list-item]

    @torch.no_grad()
    def check(self, model: Model) -> None:
        device = next((p.device for p in model.module.parameters()), None)
        for height, width in self.sides(model.preprocess.size):
            try:
                model.module(torch.zeros(1, 3, height, width, device=device))
            except (AssertionError, RuntimeError, ValueError) as error:
                raise RecipeError(
                    f"progressive: {model.name} doesn't take images of {height} by {width} pixels "
                    f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); of timm's transformers, "
                    f"add --model-kwargs dynamic_img_size=true, or set another multiple"
                ) from error

    def policy(self, step: int, steps: int) -> str:
        share = self._share(step, steps)
        return MAGNITUDE.sub(lambda found: f"{found[1]}{round(int(found[2]) * (1 + 2 * share) / 3)}", self.augment)

    def objective(self, model: Model, context: Context) -> Objective:
        return Growing(self.smoothing, self, self.sides(model.preprocess.size))

    def _share(self, step: int, steps: int) -> float:
        """How far the stages have come, from 0 in the first to 1 in the last."""
        return min(step * self.stages // steps, self.stages - 1) / (self.stages - 1)


class Growing(CrossEntropy):
    """sides: of each stage's images."""

    def __init__(self, smoothing: float, settings: Progressive, sides: list[tuple[int, int]]) -> None:
        super().__init__(smoothing)
        self.settings, self.sides = settings, sides
        self._dropouts: dict[nn.Dropout, float] = {}

    def prepare_(self, student: nn.Module) -> None:
        if self.settings.dropout:
            self._dropouts = {module: module.p for module in student.modules() if isinstance(module, nn.Dropout)}

    def finish_(self, student: nn.Module) -> None:
        for module, p in self._dropouts.items():
            module.p = p

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        share = self.settings._share(batch.step, batch.steps)
        for module in self._dropouts:
            module.p = self.settings.dropout * share
        side = self.sides[round(share * (len(self.sides) - 1))]
        if batch.images.shape[-2:] == side:
            return self.error(student(batch.images), batch)
        return self.error(student(functional.interpolate(batch.images, side, mode="bilinear", antialias=True)), batch)
