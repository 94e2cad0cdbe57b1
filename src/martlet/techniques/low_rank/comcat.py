"""comcat: of each head, the product of q and k, and that of v and proj, become products of fewer dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Choices, Context, Stage, Technique
from martlet.functional.allocation import Choice
from martlet.functional.structure.low_rank import HeadFactors, of_heads
from martlet.functional.structure.rank_allocation import least_loss, levels
from martlet.vit.structure import (
    check_attention,
    put_attention_,
    read_attention,
    record_of,
    restore_structure_,
)
from martlet.vit.view import BlockView, VitView, view

Pair = Literal["qk", "v"]
PAIRS: tuple[Pair, ...] = ("qk", "v")


@dataclass(frozen=True, kw_only=True)
class COMCAT(Technique):
    """Factorize what each head of attention multiplies, instead of each matrix.

    Scores depend on W_q and W_k through their product alone, and what a head adds to a token on W_proj W_v. Of each
    head's products the largest singular values are kept, so that dimensions of heads go, and no Linear is added; biases
    are kept exactly. At full rank the logits are the original ones. Ranks of each block follow from the spectra.
    Without images, and with no repair: right for large heads; `magnitude` and its kin cut by what images show.

    Args:
        ratio: share of the attentions' parameters to remove; 0 leaves every dimension, in new coordinates.
        multiple: dimensions that are left of each head are multiples of it; kernels work on so many at once.

    Shape: unchanged outside; dimensions of heads inside.
    Needs: nothing.
    Cost: two singular value decompositions for each head; at run time, less than before.
    Paper: Xiao et al., COMCAT, 2023, arXiv 2305.17235, from its abstract and official code.
    Differs: the paper trains which rank each layer gets, through a softmax with noise over a few ranks, and the model
        after that; here an integer programme picks the ranks whose shares of squares lost add up to the least, and
        nothing is trained. The official code has no biases in what it factorizes; here they are kept.
    Raises: RecipeError for a ratio that can't be reached, or a model none of whose attentions can be factorized, as
        under norms of q and k and of the output; SourceError for a model that isn't a vision transformer.
    """

    name: ClassVar[str] = "comcat"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "fewer dimensions of each head, by the products of q with k and of v with proj"
    paper: ClassVar[str] = "Xiao et al., COMCAT, 2023, arXiv 2305.17235"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS, Fact.WHOLE_LINEARS})

    ratio: float = 0.25
    multiple: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise RecipeError(f"comcat: ratio is the share to remove, from 0 to less than 1, not {self.ratio}")
        if self.multiple < 1:
            raise RecipeError(f"comcat: multiple is 1 or more, not {self.multiple}")

    def space(self) -> Choices:
        return Choices(settings={"ratio": (0.125, 0.25)})

    def check(self, model: Model) -> None:
        pairs(view(model.module))

    @torch.no_grad()
    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        before = view(model.module)
        able = pairs(before)
        factors = {}
        for number, found in able.items():
            context.progress("factorizing heads", len(factors), len(able))
            weights = read_attention(before.blocks[number].attention)
            factors[number] = of_heads(weights, scores="qk" in found, values="v" in found)
        ranks = self._ranks(model, before, able, factors)
        for number, each in factors.items():
            vit = view(model.module)
            qk = ranks.get((number, "qk"), each.weights.qk_dim)
            v = ranks.get((number, "v"), each.weights.v_dim)
            put_attention_(vit, vit.blocks[number], each.at(qk, v))
        record = record_of(before, list(range(len(before.blocks))), view(model.module))
        left = [
            f"{block.attention.name} ({pair})"
            for i, block in enumerate(before.blocks)
            for pair in PAIRS
            if pair not in able.get(i, ())
        ]
        return record | {"left_whole": left}

    def _ranks(
        self, model: Model, vit: VitView, able: Mapping[int, list[Pair]], factors: Mapping[int, HeadFactors]
    ) -> dict[tuple[int, Pair], int]:
        products: dict[tuple[int, Pair], dict[int, Choice]] = {}
        for number, found in able.items():
            for pair in found:
                spectrum = factors[number].scores if pair == "qk" else factors[number].values
                heads, full = spectrum.shape
                width = factors[number].weights.proj.shape[0]
                products[number, pair] = {
                    rank: Choice(float(spectrum[:, rank:].sum() / spectrum.sum()), (2 * heads * rank * width,))
                    for rank in {*levels(full, self.multiple), full}
                }
        every = sum(_params(block) for block in vit.blocks)
        total = sum(choices[max(choices)].uses[0] for choices in products.values())
        try:
            return least_loss(products, (1 - self.ratio) * every - (every - total))
        except ValueError:
            least = sum(min(choice.uses[0] for choice in choices.values()) for choices in products.values())
            raise RecipeError(
                f"comcat: ratio {self.ratio:g} can't be reached in {model.name}; with dimensions that are multiples of "
                f"{self.multiple}, at most {(total - least) / every:.2f} of the attentions' parameters can go"
            ) from None

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        restore_structure_(model.module, record)


def _params(block: BlockView) -> int:
    """Of the four maps, without biases."""
    attention = block.attention
    return sum(map_.weight.numel() for map_ in (attention.query, attention.key, attention.value, attention.proj))


def pairs(vit: VitView) -> dict[int, list[Pair]]:
    """By block, which of the two products can be factorized.

    Raises:
        RecipeError: none of any.
    """
    found: dict[int, list[Pair]] = {}
    refusal: RecipeError | None = None
    for number, block in enumerate(vit.blocks):
        for pair in PAIRS:
            try:
                check_attention(vit, block, "comcat", pair)
            except RecipeError as error:
                refusal = error
            else:
                found.setdefault(number, []).append(pair)
    if not found and refusal is not None:
        raise refusal
    return found
