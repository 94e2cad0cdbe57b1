"""mctf: tokens fuse that are alike, tell little, and are small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.functional.fusion import Fusion, attraction, bidirectional_matching
from martlet.vit.tokens import Fuse, Patches, Reading, TokenReduction, TokenRun, patches_of
from martlet.vit.view import VitView


@dataclass(frozen=True, kw_only=True)
class MCTF(TokenReduction):
    """Fuse tokens by likeness, informativeness and size, before a block's attention, by that attention.

    The block's attention of all tokens says how much each is looked at; by that, by their likeness and by how many
    patches they stand for, tokens are matched in both directions and fused before the block computes their values. The
    attention is fused with them, and not computed anew. Loses less than `tome` at the same number of tokens; costs
    more operations, and the engines' fused attention in each block that reduces, so measure it: on a CPU `tps` is the
    faster choice.

    Args:
        r: tokens to remove in every block (`r: 16`) or in some (`r: {4: 64, 8: 32}`, blocks counted from 0), at most
            half of the patches. Without it, 16 in every block but the first, as far as tokens last.
        similarity: the temperature of likeness.
        informativeness: the temperature of how much a token is looked at by all.
        size: the temperature of the number of patches.

    Shape: (B, N, C) to (B, N - r, C) in a block that reduces. Where only the class token is read, the last block
        computes only it, and where all are, each token gets the value of its group at the end.
    Needs: global attention.
    Cost: at run time, a matching and several lookups in each block that reduces; its query, key and value stay in
        floating point.
    Paper: Lee et al., Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers,
        2024, arXiv 2403.10030, sections 3.2 and 3.3.
    Differs: nothing is trained. More tokens than half are refused and not cut to what can go. Where only the class
        token is read, the last block doesn't fuse.
    Raises: RecipeError for a schedule that doesn't fit the model or a temperature below 0; SourceError for a model that
        isn't a plain ViT.
    """

    name: ClassVar[str] = "mctf"
    summary: ClassVar[str] = "fuse tokens that are alike, tell little and are small"
    paper: ClassVar[str] = "Lee et al., Multi-criteria Token Fusion (MCTF), 2024, arXiv 2403.10030"

    similarity: float = 1.0
    informativeness: float = 0.05
    size: float = 0.025

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("similarity", "informativeness", "size"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RecipeError(f"mctf: {name} is {getattr(self, name)}; it can be 0 or a positive number")

    def default(self, patches: Patches, depth: int) -> dict[int, int]:
        schedule, left = {}, patches.number
        for block in range(1, depth):
            schedule[block] = min(16, left // 2)
            left -= schedule[block]
        return schedule

    def most(self, patches: Patches) -> int:
        return patches.number // 2

    def run(self, vit: VitView, found: Reading, schedule: Mapping[int, int]) -> TokenRun:
        first = min(schedule)
        ahead = {block - first: self.fuse(r) for block, r in schedule.items()}
        patches = patches_of(vit, found.num_tokens)
        return TokenRun(vit.blocks[first:], patches, {}, self.proportional, found.num_read, ahead)

    def fuse(self, r: int) -> Fuse:
        """What fuses r tokens."""

        def fuse(x: Tensor, seen: Tensor, size: Tensor, patches: Patches) -> Fusion:
            first = [token for token in patches.tokens if token % 2 == 0]
            second = [token for token in patches.tokens if token % 2 == 1]
            temperatures = self.similarity, self.informativeness, self.size
            scores = attraction(x, seen, size, temperatures, first, second)
            return bidirectional_matching(scores, r, [*range(patches.first)], first, second)

        return fuse
