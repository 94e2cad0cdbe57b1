"""dare: of what each fine-tune changed, most is dropped by chance and the rest enlarged, before all are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.merging import drop
from martlet.merging.technique import Finetune, Merging, State, changes


@dataclass(frozen=True, kw_only=True)
class Dare(Merging):
    """Drop most of what each fine-tune changed by chance, enlarge the rest as much, and add all to the model.

    Changes of different models then seldom meet in one weight. That dropping does no harm holds for the small changes
    of fine-tuning; where models were trained far, drop less.

    Args:
        drop_ratio: the share of changes that is dropped.
        scale: of the sum of the changes, when they are added.

    Shape: none changes.
    Needs: the fine-tunes, and the model that they were tuned from (`martlet merge`); no images.
    Cost: reading them, one at a time; nothing at run time.
    Paper: Yu et al., Language Models are Super Mario (DARE), 2024, arXiv 2311.03099; held against the official code.
    Differs: it is joined with task arithmetic alone, whose scale isn't searched.
    Raises: RecipeError without fine-tunes, or for a setting out of range.
    """

    name: ClassVar[str] = "dare"
    summary: ClassVar[str] = "a few of each fine-tune's changes, drawn by chance and enlarged, are added"
    paper: ClassVar[str] = "Yu et al., Language Models are Super Mario (DARE), 2024, arXiv 2311.03099"

    drop_ratio: float = 0.9
    scale: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.drop_ratio < 1:
            raise RecipeError(f"dare: drop_ratio is {self.drop_ratio}; it can be 0, or more and less than 1")
        if not self.scale > 0:
            raise RecipeError(f"dare: scale is {self.scale}; it has to be more than 0")

    def merge(self, base: State, finetunes: Sequence[Finetune], model: Model, context: Context) -> State:
        merged = {name: tensor.double() for name, tensor in base.items()}
        generator = torch.Generator().manual_seed(context.seed)
        for vector in changes(base, finetunes):
            for name, change in vector.items():
                merged[name] += self.scale * drop(change, self.drop_ratio, generator)
        return merged
