"""evit: the patches that the class token attends to stay, and the others become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from martlet.functional.tokens import fuse_rest
from martlet.vit.tokens import Decide, Decision, Patches, TokenReduction, Tokens, in_stages


@dataclass(frozen=True, kw_only=True)
class EViT(TokenReduction):
    """Keep the patches that the class token attends to most, and fuse the others into one token.

    The ranking is the class token's attention, averaged over heads, in the block that reduces; the fused token is the
    mean of the others under it. Made to be trained with: without training it loses more than `tome`, which merges what
    is there twice and not what is looked at least.

    Args:
        r: tokens to remove in every block (`r: 8`) or in some (`r: {3: 58, 6: 41}`, blocks counted from 0); r + 1
            patches become one. Without it, the paper's: three tenths of the patches at one, two and three quarters of
            the blocks.

    Shape: (B, N, C) to (B, N - r, C) between blocks. Where only the class token is read, the last block computes only
        it, and where all are, each token gets the value of its group at the end.
    Needs: global attention and a class token.
    Cost: at run time, one row of attention and a selection in each block that reduces.
    Paper: Liang et al., Not All Patches Are What You Need: Expediting Vision Transformers via Token Reorganizations,
        2022, arXiv 2202.07800, section 3.2, equation 4.
    Differs: the weights of the fused token sum to 1, where the paper's sum to the attention that it got: without
        training, later blocks expect a token of the usual size. The fused token of an earlier block can be kept or
        fused again, as any patch; so in the official code.
    Raises: RecipeError for a schedule that doesn't fit the model, or a model without class token; SourceError for one
        that isn't a plain ViT.
    """

    name: ClassVar[str] = "evit"
    summary: ClassVar[str] = "keep the patches that the class token attends to, fuse the others"
    paper: ClassVar[str] = "Liang et al., Not All Patches Are What You Need (EViT), 2022, arXiv 2202.07800"
    proportional: ClassVar[bool] = False

    def space(self) -> None:
        """Nothing: without training, others lose several times less."""

    def asks_class_token(self) -> bool:
        return True

    def default(self, patches: Patches, depth: int) -> dict[int, int]:
        return in_stages(patches, depth)

    def most(self, patches: Patches) -> int:
        return max(patches.number - 1, 0)

    def decide(self, r: int) -> Decide:
        def decide(tokens: Tokens) -> Decision:
            seen, first = tokens.class_attention(), tokens.patches.first
            return Decision(fuse_rest(seen[:, first:], tokens.patches.number - r - 1, first), seen)

        return decide
