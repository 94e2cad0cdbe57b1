"""ties: of what fine-tunes changed, small changes are left out and signs agreed on before the mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.merging import disjoint_mean, elect, trim
from martlet.merging.technique import Finetune, Merging, State, changes


@dataclass(frozen=True, kw_only=True)
class Ties(Merging):
    """Trim each fine-tune's changes to the largest, elect a sign for each weight, and average those that agree with it.

    Loses less than `soup` and `task_arithmetic` where models of different tasks pull a weight both ways.

    Args:
        trim_ratio: the share of each model's changes, of all weights together, that are left out.
        scale: of the merged changes, when they are added.

    Shape: none changes.
    Needs: the fine-tunes, and the model that they were tuned from (`martlet merge`); no images.
    Cost: all fine-tunes in memory at once; nothing at run time.
    Paper: Yadav et al., TIES-Merging, 2023, arXiv 2306.01708; held against the official code.
    Differs: nothing known.
    Raises: RecipeError without fine-tunes, or for a setting out of range.
    """

    name: ClassVar[str] = "ties"
    summary: ClassVar[str] = "fine-tunes' largest changes, averaged where they agree on the sign"
    paper: ClassVar[str] = "Yadav et al., TIES-Merging, 2023, arXiv 2306.01708"

    trim_ratio: float = 0.8
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.trim_ratio < 1:
            raise RecipeError(f"ties: trim_ratio is {self.trim_ratio}; it can be 0, or more and less than 1")
        if not self.scale > 0:
            raise RecipeError(f"ties: scale is {self.scale}; it has to be more than 0")

    def merge(self, base: State, finetunes: Sequence[Finetune], model: Model, context: Context) -> State:
        trimmed = torch.stack(
            [
                trim(torch.cat([change.flatten() for change in vector.values()]), self.trim_ratio)
                for vector in changes(base, finetunes)
            ]
        )  # (models, all weights)
        merged = self.scale * disjoint_mean(trimmed, elect(trimmed))
        parts = merged.split([tensor.numel() for tensor in base.values()])
        return {name: tensor + part.view_as(tensor) for (name, tensor), part in zip(base.items(), parts, strict=True)}
