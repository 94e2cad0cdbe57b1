"""stvit: a few semantic tokens, centres of the patches, go through the later blocks in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.vit.reading import check_global, patches_of, reading, run_from_parts_
from martlet.vit.semantic import Grid, SemanticRun, install_semantic_
from martlet.vit.view import VitView, view


@dataclass(frozen=True, kw_only=True)
class STViT(Technique):
    """Gather the patches into a few semantic tokens by attention, and run the later blocks on these alone.

    Semantic tokens begin as means over cells of the grid. Two of the model's own blocks then gather into them: in the
    first they attend to all patches, in the second to themselves and all patches. The blocks after compute them and the
    class token. For dense outputs a last block can recover the patches, which attend to the semantic tokens. With the
    host's weights that is a model to train: sixteen tokens keep little of what ViT-Ti sees, and `tome` and `tps` lose
    far less at as many tokens.

    Args:
        tokens: semantic tokens, down and across (`tokens: [4, 4]`, the paper's sixteen). Without it, that, or the
            patches' grid where it is smaller.
        at: the first block that gathers, counted from 0. Without it, a third of the blocks run before.
        recover: the last block gives back all patches by attention, and not each the value of its cell. Only where
            the head reads patches.

    Shape: (B, N, C) to (B, prefix + tokens, C) between blocks `at` and the last. Where only the class token is read,
        the last block computes only it; else (B, N, C) comes out of it.
    Needs: global attention, a fixed image size, and two blocks from `at` on, three with `recover`. To be as good as the
        paper's, training.
    Cost: keys and values of all patches in two blocks, and with `recover` queries and an MLP of all in the last.
    Paper: Chang et al., Making Vision Transformers Efficient from A Token Sparsification View, 2023, arXiv 2303.08685,
        section 3.
    Differs: nothing is trained, and the learned global centres, which would be added in the second block, are left out.
        Cells are averaged, not maximized as in the official code of the hierarchical models. Later attention counts
        each semantic token as many times as its cell has patches. A class token goes along where there is one.
    Raises: RecipeError for a grid or a block that doesn't fit the model, one of any image size, or `recover` where
        nobody reads patches; SourceError for a model that isn't a plain ViT.
    """

    name: ClassVar[str] = "stvit"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "a few semantic tokens go through the later blocks for all patches"
    paper: ClassVar[str] = "Chang et al., A Token Sparsification View (STViT), 2023, arXiv 2303.08685"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS, Fact.ONE_EXIT})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS})

    tokens: Any = None
    at: Any = None
    recover: bool = False

    def __post_init__(self) -> None:
        if self.tokens is not None:
            sides = self.tokens if isinstance(self.tokens, list | tuple) else ()
            if len(sides) != 2 or not all(_is_count(side) and side > 0 for side in sides):
                raise RecipeError(
                    f"stvit: tokens is {self.tokens!r}; it can be a grid, down and across (tokens: [4, 4])"
                )
            object.__setattr__(self, "tokens", tuple(sides))
        if self.at is not None and not _is_count(self.at):
            raise RecipeError(f"stvit: at is {self.at!r}; it can be the number of a block, counted from 0")

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        return settings | {"tokens": [*self.tokens]} if self.tokens else settings

    def check(self, model: Model) -> None:
        self._plan(model, view(model.module))

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        vit = view(model.module)
        record = self._plan(model, vit)
        run_from_parts_(model, vit, record["at"], self.name)
        self.restore_(model, record)
        return record

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        vit = view(model.module)
        down, across = record["tokens"]
        patches = patches_of(vit, record["num_tokens"])
        run = SemanticRun(vit.blocks[record["at"] :], patches, (down, across), record["num_read"], self.recover)
        install_semantic_(run)

    def _plan(self, model: Model, vit: VitView) -> dict[str, Any]:
        """The record.

        Raises:
            SourceError: windows. RecipeError: no grid, one too small, too few blocks, or nothing to recover.
        """
        check_global(vit, self.name)
        found, depth = reading(model, vit), len(vit.blocks)
        grid = patches_of(vit, found.num_tokens).grid
        if grid is None:
            raise RecipeError(
                f"stvit averages cells of a grid, and the patches of {model.name} aren't the one that it was made for; "
                "load it for this image size, or use tome or tps"
            )
        at, least = depth // 3 if self.at is None else self.at, 3 if self.recover else 2
        if depth - at < least:
            raise RecipeError(
                f"stvit: at is {at}, and {model.name} has {depth} blocks; {least} of them must be left from there on"
            )
        tokens: Grid = self.tokens or (min(grid[0], 4), min(grid[1], 4))
        if tokens[0] > grid[0] or tokens[1] > grid[1]:
            raise RecipeError(
                f"stvit: tokens is {list(tokens)} at {vit.blocks[at].name}, where the patches of {model.name} stand "
                f"{grid[0]} by {grid[1]}; it can be at most that"
            )
        if self.recover and found.num_read:
            raise RecipeError(
                f"stvit: recover gives back patches, of which the head of {model.name} reads none; leave it out"
            )
        return {"at": at, "tokens": [*tokens], **found._asdict()}


def _is_count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0
