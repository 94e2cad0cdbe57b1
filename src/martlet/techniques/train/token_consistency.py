"""token_consistency: a model with fewer tokens learns to see what it sees with more of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model, Step
from martlet.core.technique import Context
from martlet.training.objective import Batch, CrossEntropy, Objective
from martlet.training.technique import Training
from martlet.training.tuning import classifiers
from martlet.vit.tokens import Reading, TokenReduction, TokenRun, install_, installed
from martlet.vit.view import VitView, view


@dataclass(frozen=True, kw_only=True)
class TokenConsistency(Training):
    """Train all weights on labels, with the tokens that are left and with a larger number of them, drawn in each step.

    After `mctf`, `tome`, `tps`, `evit` or `turbo`. What the classifier reads with few tokens is drawn to what it reads
    with more, so that little depends on which are fused. The schedule of the reduction is what runs in the end.

    Args:
        weight: of the mean squared distance between what the classifier reads, against each of the two cross entropies.

    Shape: none changes.
    Needs: a reduction of tokens before it, and images with labels (`--train`).
    Cost: twice to three times `finetune`; nothing at run time.
    Paper: Lee et al., Multi-criteria Token Fusion, 2024, arXiv 2403.10030, section 3.4.
    Differs: in each step all blocks remove the same share of what their schedule says, where the official code draws
        one number of tokens for all, whose schedule is even. Its threshold of confidence below which an image has no
        part in the distance is left out.
    Raises: RecipeError for a setting out of range, images without labels, or no such reduction before; and as the loop
        does.
    """

    name: ClassVar[str] = "token_consistency"
    summary: ClassVar[str] = "train on fewer tokens, towards what is seen with more"
    paper: ClassVar[str] = "Lee et al., Multi-criteria Token Fusion, 2024, arXiv 2403.10030"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULE, Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    needs_labels: ClassVar[bool] = True

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight >= 0:
            raise RecipeError(f"token_consistency: weight is {self.weight}; it can't be less than 0")

    def check(self, model: Model) -> None:
        super().check(model)
        _reduction(model)

    def objective(self, model: Model, context: Context) -> Objective:
        return Consistency(_reduction(model), model.num_classes, self.smoothing, self.weight, context.seed)


def _reduction(model: Model) -> Step:
    """What removed tokens before.

    Raises:
        RecipeError: nothing, or what learned for its own numbers of tokens.
    """
    found = [step for step in model.steps if isinstance(step.technique, TokenReduction) and step.record["removed"]]
    if not found or {*found[-1].record} > {"removed", "num_tokens", "num_read"}:
        raise RecipeError(
            f"token_consistency trains with more and with fewer tokens, and {model.name} has no reduction that can be "
            "undone in part; put tome, mctf, tps, evit or turbo before it"
        )
    return found[-1]


class Consistency(CrossEntropy):
    """reduction: what removed tokens, and how many in which block. weight: of the distance. seed: of the shares."""

    def __init__(self, reduction: Step, num_classes: int, smoothing: float, weight: float, seed: int) -> None:
        super().__init__(smoothing)
        self.technique, self.record = reduction.technique, reduction.record
        self.num_classes, self.weight, self.seed = num_classes, weight, seed

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        share = float(np.random.default_rng((self.seed, batch.step)).random())
        vit = view(student)
        whole = installed(vit.blocks)
        assert whole is not None
        (layer, *_) = classifiers(student, self.num_classes, "token_consistency").values()
        read: list[Tensor] = []  # what the classifier is given (B, C), with more tokens and with fewer
        handle = layer.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
        try:
            install_(self.partly(vit, whole, share))
            total = self.error(student(batch.images), batch)
            install_(whole)
            total = total + self.error(student(batch.images), batch)
        finally:
            install_(whole)
            handle.remove()
        more, fewer = read
        return total + self.weight * functional.mse_loss(fewer, more.detach())

    def partly(self, vit: VitView, whole: TokenRun, share: float) -> TokenRun:
        """The same blocks, that remove a share of the tokens, rounded down."""
        assert isinstance(self.technique, TokenReduction)
        schedule = {block: n for block, r in self.record["removed"] if (n := int(share * r)) > 0}
        if not schedule:
            return replace(whole, decide={}, ahead={}, pool={}, back=frozenset())
        run = self.technique.run(vit, Reading(self.record["num_tokens"], self.record["num_read"]), schedule)
        later = len(whole.blocks) - len(run.blocks)  # its first block may be one of the later ones
        return replace(
            whole,
            decide={block + later: each for block, each in run.decide.items()},
            ahead={block + later: each for block, each in run.ahead.items()},
            pool={block + later: each for block, each in run.pool.items()},
            back=frozenset(block + later for block in run.back),
        )
