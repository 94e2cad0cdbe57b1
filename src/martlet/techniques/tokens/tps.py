"""tps: the tokens that tell most stay, and the others are squeezed into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from martlet.core.errors import RecipeError
from martlet.functional.tokens import squeeze
from martlet.vit.tokens import Decide, Decision, Patches, TokenReduction, Tokens


@dataclass(frozen=True, kw_only=True)
class TPS(TokenReduction):
    """Keep the tokens that are least like others or that the class token looks at, and merge the rest into them.

    One patch in each square of four stays, so that no region is lost; of the others, those that are least like any of
    these, or most looked at by the class token. Each of the rest joins that one of all that stay with which it
    correlates most, and counts in its mean and in later attention by its size. Where `tome` merges into the fixed half
    of the tokens alone, here a token can join any that stays, in half the operations: on ViT-Ti the logits stay closer,
    though top-1 on a thousand images doesn't tell the two apart. Needs no training; costs accuracy by how much is
    removed and how early, so measure it, or let `martlet search` find the schedule.

    Args:
        r: tokens to remove in every block (`r: 8`) or in some (`r: {5: 98, 8: 49}`, blocks counted from 0). Without
            it, half of the patches after five twelfths of the blocks, once.
        informativeness: how much the log of the class token's attention, averaged over heads, weighs against the
            correlation. 0 leaves it out.

    Shape: (B, N, C) to (B, N - r, C) between blocks. Where only the class token is read, the last block computes only
        it, and where all are, each token gets the value of its group at the end.
    Needs: global attention; a class token where `informativeness` isn't 0.
    Cost: at run time, some 20 small operations in each block that reduces, and sizes in the scores of those after it.
    Paper: Wei et al., Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision Transformers,
        2023, arXiv 2304.10716, section 3.2. Sizes in attention: Bolya et al., 2023, arXiv 2210.09461, equation 1.
        One patch of each square: Bolya and Hoffman, 2023, arXiv 2303.17604, section 4. Score: the criteria of Lee et
        al., 2024, arXiv 2403.10030, section 3.2, in logarithms, with the class token's attention.
    Differs: the paper scores with a trained predictor or the class token's attention alone, and weighs what joins by
        its similarity; here nothing is trained, and what joins weighs as many patches as it stands for. Likeness is the
        correlation of channels before the block's attention. Joining is a softmax as sharp as to be a choice.
    Raises: RecipeError for a schedule that doesn't fit the model; SourceError for a model that isn't a plain ViT.
    """

    name: ClassVar[str] = "tps"
    summary: ClassVar[str] = "keep the tokens that tell most, merge the others into them"
    paper: ClassVar[str] = "Wei et al., Joint Token Pruning and Squeezing, 2023, arXiv 2304.10716"

    informativeness: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.informativeness < float("inf"):
            raise RecipeError(f"tps: informativeness is {self.informativeness}; it can be 0 or a positive number")

    def asks_class_token(self) -> bool:
        return self.informativeness > 0

    def default(self, patches: Patches, depth: int) -> dict[int, int]:
        return {5 * depth // 12: min(patches.number // 2, self.most(patches))}

    def most(self, patches: Patches) -> int:
        return max(patches.number - max(len(patches.squares()), 1), 0)

    def decide(self, r: int) -> Decide:
        def decide(tokens: Tokens) -> Decision:
            bonus = self.informativeness * tokens.class_log_attention() if self.informativeness else None
            return Decision(squeeze(tokens.before, r, tokens.patches.first, tokens.patches.squares(), bonus))

        return decide
