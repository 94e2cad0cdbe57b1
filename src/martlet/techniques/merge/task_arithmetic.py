"""task_arithmetic: what each fine-tune changed is added to the model that all come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.merging.technique import Finetune, Merging, State, changes


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Merging):
    """Add what each fine-tune changed, scaled, to the model that all were tuned from.

    Args:
        scale: of the sum of the changes. One over the number of models gives their mean, as `soup`; a negative one
            makes the model forget.

    Shape: none changes.
    Needs: the fine-tunes, and the model that they were tuned from (`martlet merge`); no images.
    Cost: reading them, one at a time; nothing at run time.
    Paper: Ilharco et al., Editing Models with Task Arithmetic, 2023, arXiv 2212.04089; the text wasn't read again.
    Differs: the scale isn't searched on held-back images; 0.4 is what the literature takes without any.
    Raises: RecipeError without fine-tunes, or for a scale of 0.
    """

    name: ClassVar[str] = "task_arithmetic"
    summary: ClassVar[str] = "what each fine-tune changed is added to the model they come from"
    paper: ClassVar[str] = "Ilharco et al., Editing Models with Task Arithmetic, 2023, arXiv 2212.04089"

    scale: float = 0.4

    def __post_init__(self) -> None:
        if not self.scale or self.scale != self.scale:
            raise RecipeError(f"task_arithmetic: scale is {self.scale}; it has to be another number than 0")

    def merge(self, base: State, finetunes: Sequence[Finetune], model: Model, context: Context) -> State:
        merged = {name: tensor.double() for name, tensor in base.items()}
        for vector in changes(base, finetunes):
            for name, change in vector.items():
                merged[name] += self.scale * change
        return merged
