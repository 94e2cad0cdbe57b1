"""turbo: tokens that repeat others and mean little become one with those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from martlet.core.errors import RecipeError
from martlet.functional.tokens import bipartite_soft_matching, pick
from martlet.vit.tokens import Decide, Decision, Patches, TokenReduction, Tokens


@dataclass(frozen=True, kw_only=True)
class Turbo(TokenReduction):
    """Merge the tokens of the least information degree: much like another, and little looked at by the class token.

    One patch in each square of four is a destination. A source's mutual redundancy is the greatest cosine of its
    attention key with a destination's; its semantic value is the class token's attention to it, averaged over heads.
    The r sources of the greatest redundancy, less `alpha` times their value, are averaged into the destination most
    like them, weighted by how many patches each token stands for. Merging by redundancy alone (`tome`) may give away
    what the answer hangs on, and by value alone (`evit`) what is there only once. Needs no training; costs accuracy by
    how much is removed and how early, so measure it.

    Args:
        r: tokens to remove in every block (`r: 8`) or in some (`r: {4: 64, 8: 32}`, blocks counted from 0), at most
            those that aren't destinations. Without it, half of the patches after five twelfths of the blocks, once.
        alpha: how much attention weighs against the cosine; 0 leaves only redundancy, a large number only value. An
            even attention to 196 patches is 0.005 for each. The default is what loses least on ViT-Ti where half goes
            at once; with few patches removed in early blocks less is better.

    Shape: (B, N, C) to (B, N - r, C) between blocks. Where only the class token is read, the last block computes only
        it, and where all are, each token gets the value of its group at the end.
    Needs: global attention; a class token where `alpha` isn't 0.
    Cost: at run time, a matching and one row of attention in each block that reduces, and sizes in the scores of those
        after it.
    Paper: Ju et al., Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Large Models, 2024, arXiv
        2407.11717, section 3: information degree, redundancy less weighted value.
    Differs: of the paper's two ways to combine them, the difference, and not the quotient. Sources and destinations
        are parted by squares, and not every other token, so that the degree has a say where half of the patches go at
        once. Only the vision transformer is reduced, and no text.
    Raises: RecipeError for a schedule that doesn't fit the model, a negative alpha, or a model without class token;
        SourceError for a model that isn't a plain ViT.
    """

    name: ClassVar[str] = "turbo"
    summary: ClassVar[str] = "merge tokens that are redundant and of little semantic value"
    paper: ClassVar[str] = "Ju et al., Turbo: Informativity-Driven Acceleration Plug-In, 2024, arXiv 2407.11717"
    drawn: ClassVar[Mapping[str, tuple[Any, ...]]] = {"alpha": (100.0, 10.0)}

    alpha: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < float("inf"):
            raise RecipeError(f"turbo: alpha is {self.alpha}; it can be 0 or a positive number")

    def asks_class_token(self) -> bool:
        return self.alpha > 0

    def default(self, patches: Patches, depth: int) -> dict[int, int]:
        return {5 * depth // 12: min(patches.number // 2, self.most(patches))}

    def most(self, patches: Patches) -> int:
        return patches.number - len(patches.squares())

    def decide(self, r: int) -> Decide:
        def decide(tokens: Tokens) -> Decision:
            destinations = tokens.patches.squares()
            sources = sorted({*tokens.patches.tokens} - {*destinations})
            value = self.alpha * pick(tokens.class_attention(), sources) if self.alpha else None  # (B, S)
            redundancy = tokens.likeness(destinations, sources)  # (B, D, S)
            first = tokens.patches.first
            return Decision(bipartite_soft_matching(redundancy, r, first, destinations, sources, value))

        return decide
