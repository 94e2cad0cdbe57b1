"""pela: factors of Linears learn what each block gives before them, and stay near the weights that they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.nn.low_rank import LowRankLinear
from martlet.training.objective import Batch, Objective, Taught, Teacher
from martlet.training.signals import observe
from martlet.training.technique import Training
from martlet.vit.view import view


@dataclass(frozen=True, kw_only=True)
class PELA(Training):
    """Train a factorized vision transformer to give its teacher's tokens after each block, with factors held back.

    Comes after what factorizes (`svd | pela`, `afm | pela`), and gets back most of what that lost. Beside the tokens
    and the logits, the loss has how far the largest change of a weight is from a limit, so that the products stay what
    the whole weights were but for that. The logits alone, as `distill` learns them, need more images.

    Args:
        features: how much the squared error of the tokens weighs beside the logits; 0 leaves it out.
        perturbation: how much it weighs that factors leave their weights; 0 leaves it out.
        limit: of the change of a weight, in its own unit.

    Shape: none changes.
    Needs: images; labels aren't used. The teacher is the model before it was factorized, or one of its structure.
    Cost: about four inferences a step and image, in floating point; nothing at run time.
    Paper: Guo et al., PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, 2023, arXiv 2310.10700,
        from its abstract and official code: tokens of each block, and the infinity norm of products less weights.
    Differs: the loss on labels is the divergence from the teacher's logits, so that none are needed. Ranks are what the
        technique before gave, where the code gives all Linears the same share.
    Raises: RecipeError for a model without factors, a teacher without the weights they came from, a setting out of
        range, or without images; SourceError for a model that isn't a vision transformer; and as the loop does.
    """

    name: ClassVar[str] = "pela"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "train factors of Linears on the tokens of each block, near the weights they came from"
    paper: ClassVar[str] = "Guo et al., PELA: Parameter-Efficient Models with Low-Rank Approximation, 2023"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS, Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})

    features: float = 1.0
    perturbation: float = 1.0
    limit: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("features", "perturbation", "limit"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"pela: {name} is {getattr(self, name)}; it can't be less than 0")

    def check(self, model: Model) -> None:
        if not _factors(model.module):
            raise RecipeError(
                f"pela: nothing of {model.name} is factorized yet; put what factorizes before it: svd | pela"
            )
        view(model.module)

    def objective(self, model: Model, context: Context) -> Objective:
        assert context.teacher is not None
        whole = dict(context.teacher.module.named_modules())
        weights = {}
        for name, factors in _factors(model.module).items():
            its = whole.get(name)
            if not isinstance(its, nn.Linear) or its.weight.shape != factors.weight.shape:
                raise RecipeError(
                    f"pela: the teacher {context.teacher.name} has no Linear {tuple(factors.weight.shape)} at {name}, "
                    "whose weight the factors are held to; leave the teacher out"
                )
            weights[name] = its.weight
        return Held(Teacher(context.teacher, model), weights, self.features, self.perturbation, self.limit)


def _factors(module: nn.Module) -> dict[str, LowRankLinear]:
    return {name: each for name, each in module.named_modules() if isinstance(each, LowRankLinear)}


class Held(Taught):
    """weights: of the Linears before they were factorized, by name. The others are the technique's settings."""

    def __init__(
        self, teacher: Teacher, weights: Mapping[str, Tensor], features: float, perturbation: float, limit: float
    ) -> None:
        super().__init__(teacher)
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self.features, self.perturbation, self.limit = features, perturbation, limit

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        logits, own = observe(student, batch.images)
        wanted, theirs = self.teacher.observe(batch.images)
        loss = self.error(logits, wanted)
        if self.features:
            pairs = zip(own.tokens, theirs.tokens, strict=True)
            loss = loss + self.features * torch.stack([functional.mse_loss(a, b) for a, b in pairs]).mean()
        if self.perturbation:
            loss = loss + self.perturbation * self.change(student)
        return loss

    def change(self, student: nn.Module) -> Tensor:
        """The mean over factorized Linears of (‖up down - W‖_∞ - limit)²."""
        changes = [
            (factors.weight - self._weights[name].to(factors.up.weight.device)).abs().max()
            for name, factors in _factors(student).items()
        ]
        return (torch.stack(changes) - self.limit).square().mean()
