"""skipvit: patches that the class token looks at least skip blocks, and come back before the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.functional.tokens import rejoin, skip
from martlet.vit.tokens import Decide, Decision, Patches, Reading, TokenReduction, TokenRun, Tokens
from martlet.vit.view import VitView


@dataclass(frozen=True, kw_only=True)
class SkipViT(TokenReduction):
    """Let the patches that the class token attends to least go around blocks, and take them back before the last.

    A skip connection for tokens: what leaves is lost to the blocks between, which run on the others alone, but not to
    the last, whose attention sees all patches again, those that skipped as they were. Adds no parameter. A model to
    train, which is what the paper does and saves time by. Without training it loses more than if the patches were left
    out for good (`evit`), for the last block has never seen any that skipped, and far more than `tome`.

    Args:
        r: tokens that skip, from the MLP of a block on (`r: {4: 108}`, blocks counted from 0), or more at each of
            several (`r: {3: 60, 6: 48}`). Without it, the paper's 55 % of the patches, at a third of the blocks.
        back: the block before which all come back. Without it, the last.

    Shape: (B, N, C) to (B, N - r, C) between the blocks that are skipped, and (B, N, C) from `back` on.
    Needs: global attention and a class token; to be useful, training.
    Cost: at run time, one row of attention, a selection and a product in each block that tokens leave; a product where
        they come back.
    Paper: Ataiefard et al., SkipViT: Speeding Up Vision Transformers with a Token-Level Skip Connection, 2024, arXiv
        2401.15293.
    Differs: nothing is trained. The class token's attention is averaged over heads. There is no official code.
    Raises: RecipeError for a schedule that doesn't fit the model, or a model without class token; SourceError for one
        that isn't a plain ViT.
    """

    name: ClassVar[str] = "skipvit"
    summary: ClassVar[str] = "patches that tell little skip blocks, and come back before the last"
    paper: ClassVar[str] = "Ataiefard et al., SkipViT: a Token-Level Skip Connection, 2024, arXiv 2401.15293"
    proportional: ClassVar[bool] = False

    back: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.back is not None and (not isinstance(self.back, int) or isinstance(self.back, bool) or self.back < 1):
            raise RecipeError(f"skipvit: back is {self.back!r}; it can be the number of a block, counted from 0")

    def space(self) -> None:
        """Nothing: without training, others lose several times less."""

    def asks_class_token(self) -> bool:
        return True

    def default(self, patches: Patches, depth: int) -> dict[int, int]:
        block = min(depth // 3, self._back(depth) - 1)
        return {block: 11 * patches.number // 20} if block >= 0 else {}

    def most(self, patches: Patches) -> int:
        return max(patches.number - 1, 0)

    def run(self, vit: VitView, found: Reading, schedule: Mapping[int, int]) -> TokenRun:
        back = self._back(len(vit.blocks)) - min(schedule)
        return replace(super().run(vit, found, schedule), back=frozenset({back}))

    def decide(self, r: int) -> Decide:
        def decide(tokens: Tokens) -> Decision:
            first = tokens.patches.first
            reduction = skip(tokens.class_attention()[:, first:], tokens.patches.number - r, first)
            return Decision(reduction, restore=partial(rejoin, x=tokens.x, reduction=reduction))

        return decide

    def _back(self, depth: int) -> int:
        return depth - 1 if self.back is None else self.back

    def _plan(self, model: Model, vit: VitView) -> tuple[Reading, dict[int, int]]:
        found, schedule = super()._plan(model, vit)
        back, depth = self._back(len(vit.blocks)), len(vit.blocks)
        if back >= depth:
            raise RecipeError(f"skipvit: back is {back}; {model.name} has the blocks 0 to {depth - 1}")
        if schedule and max(schedule) >= back:
            late = vit.blocks[max(schedule)].name
            raise RecipeError(
                f"skipvit: tokens leave at {late} and come back before {vit.blocks[back].name}; name blocks before "
                f"that, such as r: {{{max(back - 1, 0)}: {schedule[max(schedule)]}}}"
            )
        return found, schedule
