"""svdquant: the greatest singular values of each weight stay in floating point beside what few bits hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.quantize.reparameterize import ChannelChange
from martlet.functional.quantize.search import search_affine, squared_error
from martlet.functional.quantize.smoothing import smoothquant_factors
from martlet.graph.fit import Operand
from martlet.graph.low_bit import Reparameterized, affine, sample
from martlet.graph.rewrite.low_rank import add_branches_, in_branch, split_linears_
from martlet.graph.rewrite.reparameterize import ratios
from martlet.graph.sites import Site
from martlet.nn.quantizers import Quantizer

SMOOTHING = 0.5
"""The power of activations against that of weights."""


@dataclass(frozen=True, kw_only=True)
class SVDQuant(Reparameterized):
    """Quantize a vision transformer to few bits beside a low-rank branch that takes the outliers of the weights.

    LayerNorm outputs are smoothed into the weights that read them; of every Linear's weight the greatest singular
    values become two narrow Linears in floating point, and what is left is rounded. The arithmetic is simulated. A LoRA
    that was learned on the whole model can join them later, with `attach_lora`.

    Args:
        rank: of the branch; 0 has none.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: two forward passes and a singular value decomposition of each weight; at run time rank (I + O) MACs a token
        for each Linear, in floating point.
    Paper: Li et al., SVDQuant, 2024, arXiv 2411.05007.
    Differs: the branch reads the activations as they are, where the paper's has 16 bits; factors of smoothing have
        power 0.5 and aren't searched, and inputs that no LayerNorm gives aren't smoothed. Activations have one grid a
        tensor and weights one a row, of least squared error, where the paper has one for each 64 values. q, k, v and
        the softmax are rounded too.
    Raises: RecipeError for settings out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "svdquant"
    summary: ClassVar[str] = "few bits beside a low-rank branch in floating point"
    paper: ClassVar[str] = "Li et al., SVDQuant, 2024, arXiv 2411.05007"

    rank: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise RecipeError(f"svdquant: rank is {self.rank}; it can be 0, for no branch, or more")

    def prepare_(self, graph_module: GraphModule, images: Tensor, context: Context) -> dict[str, Any]:
        changed = super().prepare_(graph_module, images, context)
        if not self.rank:
            return {**changed, "ranks": {}}
        return {**changed, "ratios": ratios(graph_module), "ranks": split_linears_(graph_module, self.rank)}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        add_branches_(model.module, record["ranks"])
        super().restore_(model, record)

    def rounds(self, site: Site) -> bool:
        """All but the branches."""
        return not in_branch(site)

    def change(self, rows: Tensor, weights: Sequence[Tensor]) -> ChannelChange:
        """SmoothQuant's factors."""
        weight_amax = torch.cat(list(weights)).abs().amax(0)
        factors = smoothquant_factors(rows.abs().amax(0), weight_amax, SMOOTHING)
        return ChannelChange(factors, torch.zeros_like(factors))

    def activation(self, operand: Operand) -> Quantizer:
        few = sample(operand.value)
        return affine(search_affine(squared_error(few), few, self.bits(operand.kind), steps=3))
