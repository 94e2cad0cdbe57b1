"""tome: tokens that are alike become one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from martlet.core.errors import RecipeError
from martlet.functional.tokens import bipartite_soft_matching, matched_pairs, pick
from martlet.vit.tokens import Decide, Decision, Patches, TokenReduction, Tokens

PARTITIONS = ("alternating", "2x2")


@dataclass(frozen=True, kw_only=True)
class ToMe(TokenReduction):
    """Merge the tokens whose attention keys are most alike, between a block's attention and its MLP.

    Patches are parted in sources and destinations; each source finds the destination whose key has the greatest cosine
    with its own, and the r sources with the greatest one are averaged into theirs, weighted by how many patches each
    token stands for. Later attention counts a merged token as many times. Class, distillation and register tokens are
    never merged. Needs no training; costs accuracy by how much is removed and how early, so measure it. On a CPU one
    large reduction is faster than one in every block, whose matching costs what it saves.

    Args:
        r: tokens to remove in every block (`r: 8`) or in some (`r: {4: 64, 8: 32}`, blocks counted from 0). Without
            it, half of the patches after five twelfths of the blocks, once: of the schedules tried on ViT-Ti, what
            loses least for its time.
        partition: `alternating` (the paper's: every other token is a destination), or `2x2`: one patch in each square
            of four is, later every fourth token, so that three quarters can be merged at once.
        informativeness: how much a source is spared for what the class token sees in it: times the log of the class
            token's attention, averaged over heads, it is subtracted from the cosine. 0 leaves it out (the paper).

    Shape: (B, N, C) to (B, N - r, C) between blocks. Where only the class token is read, the last block computes only
        it, and where all are, each token gets the value of its group at the end.
    Needs: global attention; a class token where `informativeness` isn't 0.
    Cost: at run time, a matching in each block that reduces, and sizes in the scores of those after it.
    Paper: Bolya et al., Token Merging: Your ViT But Faster, 2023, arXiv 2210.09461, section 3, equation 1. `2x2`: Bolya
        and Hoffman, Token Merging for Fast Stable Diffusion, 2023, arXiv 2303.17604, section 4. `informativeness`: the
        criterion of Lee et al., Multi-criteria Token Fusion, 2024, arXiv 2403.10030, section 3.2, in logarithms, and of
        the class token's attention and not of all tokens'.
    Differs: a source that is as like to several destinations, as it may be when numbers are rounded, is shared among
        them. More tokens than can be merged are refused and not cut to what can. Reductions in the last block, which
        change nothing that a class token's head reads, are left out.
    Raises: RecipeError for a schedule that doesn't fit the model; SourceError for a model that isn't a plain ViT.
    """

    name: ClassVar[str] = "tome"
    summary: ClassVar[str] = "merge tokens that are alike"
    paper: ClassVar[str] = "Bolya et al., Token Merging: Your ViT But Faster, 2023, arXiv 2210.09461"
    paired: ClassVar[bool] = True
    drawn: ClassVar[Mapping[str, tuple[Any, ...]]] = {"partition": ("2x2",), "informativeness": (0.3, 0.0)}

    partition: str = "alternating"
    informativeness: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition not in PARTITIONS:
            raise RecipeError(f"tome: partition is {self.partition!r}; it can be {', '.join(PARTITIONS)}")
        if not 0 <= self.informativeness < float("inf"):
            raise RecipeError(f"tome: informativeness is {self.informativeness}; it can be 0 or a positive number")

    def asks_class_token(self) -> bool:
        return self.informativeness > 0

    def default(self, patches: Patches, depth: int) -> dict[int, int]:
        return {5 * depth // 12: min(patches.number // 2, self.most(patches))}

    def most(self, patches: Patches) -> int:
        destinations, sources = self._parts(patches)
        return len(sources) if destinations else 0

    def decide(self, r: int) -> Decide:
        def decide(tokens: Tokens) -> Decision:
            destinations, sources = self._parts(tokens.patches)
            scores = tokens.likeness(destinations, sources)  # (B, D, S)
            handicap = None
            if self.informativeness:
                handicap = self.informativeness * pick(tokens.class_log_attention(), sources)  # (B, S)
            reduction = bipartite_soft_matching(scores, r, tokens.patches.first, destinations, sources, handicap)
            pairs = partial(matched_pairs, reduction, scores, destinations, sources, handicap)
            return Decision(reduction, pairs=pairs)

        return decide

    def _parts(self, patches: Patches) -> tuple[list[int], list[int]]:
        """Destinations and sources among the tokens."""
        if self.partition == "alternating":
            chosen = [token for token in patches.tokens if token % 2 == 1]
        else:
            chosen = patches.squares()
        return chosen, sorted({*patches.tokens} - {*chosen})
