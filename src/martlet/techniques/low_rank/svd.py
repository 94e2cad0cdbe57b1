"""svd: each Linear becomes the product of two thin ones that is nearest to its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.structure.low_rank import Factors, of_weight
from martlet.nn.factorization import Factorization, Site


@dataclass(frozen=True, kw_only=True)
class SVD(Factorization):
    """Factorize the Linears of any model, by their weights alone.

    A weight (O, I) becomes (O, r) (r, I) with its r greatest singular values; ranks are chosen so that the shares of
    squares lost add up to the least. A Linear whose factors would cost more than it does stays whole, and the record
    names it. Without images, and with no repair: `afm` loses much less at the same ranks. Right as a start for
    training, and as what to compare with.

    Args:
        ratio: share to remove of what the model's Linears have together; 0 replaces none.
        count: of what; `macs`, or `params`.
        allocation: `milp` gives each Linear the rank that loses least for what it costs; `same`, all the same share.
        multiple: ranks are multiples of it; kernels work on so many at once.
        energy: keep this share of each weight's squares instead, at whatever rank it takes; 0 goes by `ratio`.

    Shape: none changes.
    Needs: nothing. One image of noise is run, to see which Linears run.
    Cost: a singular value decomposition for each Linear; at run time, two products of rank r.
    Paper: Cahyawijaya, Greenformers, 2021, arXiv 2108.10808 (Low-Rank Transformer).
    Differs: of the thesis its abstract was at hand, and not its text; it trains with factors of one rank, and here
        trained weights are factorized, with ranks by integer programming.
    Raises: RecipeError for a ratio that can't be reached, or a model without a Linear worth factorizing.
    """

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "two thin Linears in the place of each, nearest to its weight"
    paper: ClassVar[str] = "Cahyawijaya, Greenformers, 2021, arXiv 2108.10808"

    energy: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.energy < 1:
            raise RecipeError(f"svd: energy is the share of squares to keep, from 0 to less than 1, not {self.energy}")

    def factors(self, model: Model, found: list[Site], context: Context) -> dict[str, Factors]:
        factors = {}
        for i, site in enumerate(found):
            context.progress("factorizing", i, len(found))
            factors[site.name] = of_weight(site.linear.weight, site.linear.bias)
        return factors

    def ranks(
        self, model: Model, found: list[Site], factors: Mapping[str, Factors], context: Context
    ) -> dict[str, int]:
        if not self.energy:
            return super().ranks(model, found, factors, context)
        ranks = {}
        for site in found:
            kept = [rank for rank in self._ranks(site) if factors[site.name].lost(rank) <= 1 - self.energy]
            if kept:
                ranks[site.name] = kept[0]
        return ranks
