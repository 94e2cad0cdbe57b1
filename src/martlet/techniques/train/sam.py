"""sam: each step goes down from where the loss is highest nearby, so training ends in a flat place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.training.objective import CrossEntropy, Objective
from martlet.training.technique import Training


@dataclass(frozen=True, kw_only=True)
class Sam(Training):
    """Train all weights on labels by the gradient at the worst place within a small distance.

    A vision transformer trained from scratch on few images learns them by heart in a sharp place; this keeps it out of
    such. Augmentation that is strong enough does much of the same for less.

    Args:
        rho: the distance, in the norm of all weights together.

    Shape: none changes.
    Needs: images with labels (`--train`).
    Cost: twice `finetune`, for each step takes two gradients; nothing at run time.
    Paper: Foret et al., Sharpness-Aware Minimization, 2021, arXiv 2010.01412; Chen et al., When
        Vision Transformers Outperform ResNets, 2022, arXiv 2106.01548, for vision transformers.
    Differs: several processes share one place, where the second paper has each look for its own. Dropout is drawn anew
        for the second gradient. The texts weren't read again.
    Raises: RecipeError for a setting out of range, or images without labels; and as the loop does.
    """

    name: ClassVar[str] = "sam"
    summary: ClassVar[str] = "train on labels by the gradient where the loss is highest nearby"
    paper: ClassVar[str] = "Chen et al., When Vision Transformers Outperform ResNets, 2022, arXiv 2106.01548"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    needs_labels: ClassVar[bool] = True

    rho: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho > 0:
            raise RecipeError(f"sam: rho is {self.rho}; it has to be more than 0")

    def objective(self, model: Model, context: Context) -> Objective:
        return Sharpness(self.smoothing, self.rho)


class Sharpness(CrossEntropy):
    """rho: how far from the weights it looks."""

    def __init__(self, smoothing: float, rho: float) -> None:
        super().__init__(smoothing)
        self.rho = rho
        self._before: list[Tensor] = []

    @torch.no_grad()
    def climb_(self, learned: list[Tensor]) -> bool:
        gradients = [p.grad for p in learned if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm() + 1e-12
        self._before = [p.clone() for p in learned]
        for parameter in learned:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=float(self.rho / norm))  # w + ρ g / ‖g‖
        return True

    @torch.no_grad()
    def descend_(self, learned: list[Tensor]) -> None:
        for parameter, before in zip(learned, self._before, strict=True):
            parameter.copy_(before)
        self._before = []
