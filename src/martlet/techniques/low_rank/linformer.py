"""linformer: queries see a few weighted sums of all keys and values, in the place of each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.vit.reading import check_global, patches_of, reading
from martlet.vit.structure import check_attention, read_attention, write_attention_
from martlet.vit.token_run import Patches
from martlet.vit.view import view


@dataclass(frozen=True, kw_only=True)
class Linformer(Technique):
    """Let attention see sums of keys and values over cells of the patches' grid, with weights that can be trained.

    Softmax over N keys becomes softmax over K sums, so the cost of attention grows with N and not with its square. The
    sums begin as means over cells, each counted as as many keys as it has, and are parameters: `linformer | distill`
    trains them. Right for many tokens: with fewer than some hundred, what sums cost is what they save, and `tome`
    loses less. Each token keeps its query, so all tokens stay.

    Args:
        stride: side of a cell, in patches; class token and registers are cells of their own. 1 leaves each patch alone,
            which gives the same logits.

    Shape: none changes.
    Needs: nothing, but training after it to lose little.
    Cost: at run time, two products of K × N weights for each head, and attention of K keys.
    Paper: Wang et al., Linformer, 2020, arXiv 2006.04768, as compared in Cahyawijaya, Greenformers, 2021, arXiv
        2108.10808; from their abstracts and public code.
    Differs: a trained model is converted, so weights begin as means and not as noise, and a sum of several keys has
        their number's logarithm added to its score, which is trained too. Weights are a block's own, shared by heads.
    Raises: RecipeError for a stride that leaves one cell; SourceError for attention in windows, or a model that isn't a
        vision transformer.
    """

    name: ClassVar[str] = "linformer"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "attention to weighted sums of keys and values, over cells of patches"
    paper: ClassVar[str] = "Wang et al., Linformer: Self-Attention with Linear Complexity, 2020, arXiv 2006.04768"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS, Fact.WHOLE_LINEARS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS})

    stride: int = 2

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise RecipeError(f"linformer: stride is 1 or more patches, not {self.stride}")

    def check(self, model: Model) -> None:
        vit = view(model.module)
        check_global(vit, self.name)
        for block in vit.blocks:
            check_attention(vit, block, self.name, "keys")
        patches = patches_of(vit, reading(model, vit).num_tokens)
        if int(cells(patches, self.stride).max()) == patches.first:
            raise RecipeError(
                f"linformer: stride {self.stride} makes all {patches.number} patches at {vit.blocks[0].name} one cell; "
                "choose a smaller one"
            )

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        vit = view(model.module)
        groups = cells(patches_of(vit, reading(model, vit).num_tokens), self.stride)
        record = {"slots": [len(groups), int(groups.max()) + 1]}
        self.restore_(model, record)
        for block in view(model.module).blocks:
            block.attention.module.slots.set_(groups)  # type: ignore[operator, union-attr]
        return record

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        num_tokens, num_slots = record["slots"]
        vit = view(model.module)
        for block in vit.blocks:
            write_attention_(vit, block, read_attention(block.attention), slots=(num_tokens, num_slots))


def cells(patches: Patches, stride: int) -> Tensor:
    """The cell of each token, (N,): squares of the grid in row order, or runs, if patches have no places."""
    if patches.grid is None:
        found = torch.arange(patches.number) // stride**2
    else:
        down, across = (torch.arange(side) // stride for side in patches.grid)
        found = (down[:, None] * (across[-1] + 1) + across).flatten()
    return torch.cat([torch.arange(patches.first), found + patches.first])
