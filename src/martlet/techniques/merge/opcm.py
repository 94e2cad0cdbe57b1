"""opcm: fine-tunes are merged one after the other, each by what lies outside of what the others changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.merging import project_away
from martlet.merging.technique import Finetune, Merging, State, changes


@dataclass(frozen=True, kw_only=True)
class Opcm(Merging):
    """Merge fine-tunes one at a time: of a Linear's change, add what is orthogonal to all that was merged before.

    After each, all changes are scaled so that their norm is the mean norm of the models' own, whatever their number.
    Memory doesn't grow with the number of models.

    Args:
        share: of the sum of the singular values of what was merged, those that a new change has to leave alone. 0 keeps
            only the directions of its singular vectors apart; more protects the models before, and takes from the new.

    Shape: none changes.
    Needs: the fine-tunes, in order, and the model that they were tuned from (`martlet merge`); no images.
    Cost: a singular value decomposition of every Linear for each model; nothing at run time.
    Paper: Tang et al., Merging Models on the Fly Without Retraining (OPCM), 2025, arXiv 2501.09522; the official code,
        whose 0.5 is the default; the paper's text wasn't at hand.
    Differs: nothing known.
    Raises: RecipeError without fine-tunes, or for a share out of range.
    """

    name: ClassVar[str] = "opcm"
    summary: ClassVar[str] = "fine-tunes merged one by one, each outside of what the others changed"
    paper: ClassVar[str] = "Tang et al., Merging Models on the Fly Without Retraining, 2025, arXiv 2501.09522"

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise RecipeError(f"opcm: share is {self.share}; it can be 0, or more and less than 1")

    def merge(self, base: State, finetunes: Sequence[Finetune], model: Model, context: Context) -> State:
        linears = {f"{name}.weight" for name, m in model.module.named_modules() if isinstance(m, nn.Linear)}
        merged: dict[str, Tensor] = {}
        norm, scale = 0.0, 1.0  # the models' mean norm; what merged was divided by
        for i, change in enumerate(changes(base, finetunes)):
            context.progress("merge", i, len(finetunes))
            norm += (_norm(change) - norm) / (i + 1)
            if not merged:
                merged = change
                continue
            for name, before in merged.items():
                new = project_away(change[name], before, self.share) if name in linears else change[name]
                merged[name] = scale * before + new
            scale = _norm(merged) / norm
            merged = {name: tensor / scale for name, tensor in merged.items()}
        return {name: tensor + merged[name] for name, tensor in base.items()}


def _norm(change: State) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in change.values()]).sum().sqrt())
