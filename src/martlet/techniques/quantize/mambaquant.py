"""mambaquant: channels of unlike variance are made alike by rotations that the weights take up, before few bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.model import Model
from martlet.core.technique import Context, leave_out
from martlet.functional.quantize.rotation import klt_basis, rotation, standard_basis, variance_spread
from martlet.functional.quantize.search import search_affine, squared_error
from martlet.functional.quantize.smoothing import smoothquant_factors
from martlet.graph.attention import Attention, attentions, scale_channels_
from martlet.graph.fit import Operand
from martlet.graph.low_bit import LowBit, affine, sample
from martlet.graph.rewrite.layout import scale_after_scores_
from martlet.graph.rewrite.rotate import (
    NOTHING,
    add_turns_,
    covariances,
    fold_norms_,
    is_turn,
    rotate_gate_,
    rotate_pair_,
    rotate_scores_,
    rotate_stream_,
    rotate_values_,
    smooth_gate_,
)
from martlet.graph.rounding import tensor
from martlet.graph.sites import Site
from martlet.graph.state_space import Gate, Pair, gates, pairs
from martlet.graph.streams import Stream, streams
from martlet.nn.quantizers import Quantizer

SMOOTHING = 0.5
"""The power of a query channel's deviation that moves into the key, and of a gate's that moves into the weight."""


@dataclass(frozen=True, kw_only=True)
class MambaQuant(LowBit):
    """Quantize to few bits after rotations that give all channels of a tensor the same variance.

    Residual streams, v of each head, and what goes from one layer to another with nothing in between, as a state space
    model's Δ does, are turned to their Karhunen-Loève basis and spread by a Hadamard matrix (KLT-enhanced rotation). q
    and k of each head are scaled against each other and turned, and so is what a gate gives to a Linear, against the
    Linear's weight (Smooth-Fused rotation). The weights take all of it up but a gate's rotation, which is computed
    while the model runs. What reads a convolution, a GELU or a batch norm isn't rotated.

    Args:
        klt: False turns Hadamard matrices alone, as QuaRot does, to compare.
        smooth: False scales neither q and k nor gates.

    Shape: none changes.
    Needs: images, without labels; the first 32 are looked at.
    Cost: two forward passes, and an eigendecomposition of the channels of each stream, each head and each Δ; at run
        time C² MACs a token for each gate of C channels, in floating point.
    Paper: Xu et al., MambaQuant, 2025, arXiv 2501.13484, KLT-enhanced and Smooth-Fused rotation.
    Differs: for attention too, where the paper has state space models alone. One basis serves all LayerNorms that read
        a stream, by the mean of their covariances, each divided by its trace. Rotations keep the vector of ones, so
        that LayerNorms stay LayerNorms. A gate's rotation is a dense product, where a fast Hadamard transform would do
        with C log C additions. A gate is smoothed where a LayerNorm gives one of its factors; the paper's scaled SiLU,
        for gates without one, isn't built, nor is anything rotated within the scan. The input of an MLP's second
        Linear isn't rotated. Channels are scaled by their deviations, not their greatest values. Grids have least
        squared error.
    Raises: RecipeError for bits out of range or without images; UsageError if the model multiplies nothing;
        NumericsError for an activation that is NaN.
    """

    name: ClassVar[str] = "mambaquant"
    summary: ClassVar[str] = "few bits after rotations in the Karhunen-Loève basis that even channels out"
    paper: ClassVar[str] = "Xu et al., MambaQuant, 2025, arXiv 2501.13484"

    weight_bits: int = 8
    activation_bits: int = 8
    klt: bool = True
    smooth: bool = True

    def prepare_(self, graph_module: GraphModule, images: Tensor, context: Context) -> dict[str, Any]:
        scale_after_scores_(graph_module)
        found, heads = streams(graph_module), attentions(graph_module)
        norms = [norm for stream in found.found for norm in stream.norms]
        scales = {norm: _scale(graph_module, norm) for norm in norms}
        for stream in found.found:
            fold_norms_(graph_module, stream)
        linears = [part.linear for a in heads for part in (a.q, a.k, a.v) if part]
        between, gated = pairs(graph_module), gates(graph_module)
        views = {pair.operand: pair.rows for pair in between}
        looked_at = dict.fromkeys([*norms, *linears, *views, *(gate.product for gate in gated)])
        seen = covariances(graph_module, looked_at, images, context.progress, views)
        generator = torch.Generator().manual_seed(context.seed)
        before, after = list[float](), list[float]()
        for stream in found.found:
            turned = self._for_stream(stream, [seen[norm] for norm in stream.norms], generator)
            rotate_stream_(graph_module, stream, turned)
            before += [variance_spread(seen[norm].diagonal() * scales[norm] ** 2) for norm in stream.norms]
            after += [variance_spread((turned.T @ seen[norm] @ turned).diagonal()) for norm in stream.norms]
        values = [self._rotate_values_(graph_module, attention, seen, generator) for attention in heads]
        scores = [self._rotate_scores_(graph_module, attention, seen, generator) for attention in heads]
        for pair in between:
            covariance = seen[pair.operand]
            turned = self._rotate_pair_(graph_module, pair, covariance, generator)
            before += [variance_spread(channels) for channels in _channels(covariance)]
            after += [variance_spread(channels) for channels in _channels(turned.mT @ covariance @ turned)]
        for gate in gated:
            covariance = seen[gate.product]
            turned = self._rotate_gate_(graph_module, gate, covariance, generator)
            before.append(variance_spread(covariance.diagonal()))
            after.append(variance_spread((turned.T @ covariance @ turned).diagonal()))
        counts = {"norms": len(norms), "values": sum(values), "scores": sum(scores)}
        record: dict[str, Any] = {
            "rotated": counts | {"pairs": len(between), "gates": len(gated)},
            "attentions": len(heads),
            "norms_left": found.left,
            "turns": [gate.linear.name for gate in gated],
        }
        if before:
            record["variance_spread"] = {"before": _mean(before), "after": _mean(after)}
        return record if any(record["rotated"].values()) else leave_out(record, NOTHING)

    def rounds(self, site: Site) -> bool:
        """All but the rotations that are computed while the model runs."""
        return not is_turn(site)

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        scale_after_scores_(model.module)
        add_turns_(model.module, record["turns"])
        super().restore_(model, record)

    def activation(self, operand: Operand) -> Quantizer:
        few = sample(operand.value)
        return affine(search_affine(squared_error(few), few, self.bits(operand.kind), steps=3))

    def _for_stream(self, stream: Stream, seen: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        if not self.klt:
            return rotation(standard_basis(stream.width), generator)
        together = torch.stack([covariance / covariance.trace().clamp(min=1e-12) for covariance in seen]).sum(0)
        return rotation(klt_basis(together, keep_ones=True), generator)

    def _rotate_pair_(
        self, graph_module: GraphModule, pair: Pair, covariance: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Returns the rotation (*groups, R, R)."""
        each = covariance.reshape(-1, *covariance.shape[-2:])
        bases = [klt_basis(c) if self.klt else torch.eye(len(c), dtype=torch.float64) for c in each]
        turned = torch.stack([rotation(basis, generator) for basis in bases]).reshape(covariance.shape)
        rotate_pair_(graph_module, pair, turned)
        return turned

    def _rotate_gate_(
        self, graph_module: GraphModule, gate: Gate, covariance: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Returns what a gate's channels are multiplied with in all, (C, C)."""
        factors = torch.ones(len(covariance), dtype=torch.float64)
        if self.smooth and gate.norm is not None:
            weight = tensor(graph_module, gate.linear.args[1]).detach().double()
            factors = smoothquant_factors(covariance.diagonal().sqrt(), weight.square().mean(0).sqrt(), SMOOTHING)
            smooth_gate_(graph_module, gate, factors)
        turned = rotation(torch.eye(len(factors), dtype=torch.float64), generator)
        rotate_gate_(graph_module, gate, turned)
        return turned / factors[:, None]

    def _rotate_values_(
        self, graph_module: GraphModule, attention: Attention, seen: Mapping[Node, Tensor], generator: torch.Generator
    ) -> bool:
        if attention.v is None or attention.output is None:
            return False
        covariance = seen[attention.v.linear]
        bases = [klt_basis(covariance[i][:, i]) if self.klt else torch.eye(len(i)) for i in attention.v.index]
        rotate_values_(graph_module, attention, torch.stack([rotation(basis, generator) for basis in bases]))
        return True

    def _rotate_scores_(
        self, graph_module: GraphModule, attention: Attention, seen: Mapping[Node, Tensor], generator: torch.Generator
    ) -> bool:
        if attention.q is None or attention.k is None:
            return False
        if self.smooth:
            q, k = (seen[part.linear].diagonal()[part.index].sqrt() for part in (attention.q, attention.k))  # (H, D)
            factors = [smoothquant_factors(one, other, SMOOTHING) for one, other in zip(q, k, strict=True)]
            scale_channels_(graph_module, attention, qk=1 / torch.stack(factors))
        heads, width = attention.q.index.shape
        turned = torch.stack([rotation(torch.eye(width), generator) for _ in range(heads)])
        rotate_scores_(graph_module, attention, turned)
        return True


def _scale(graph_module: GraphModule, norm: Node) -> Tensor:
    """What a LayerNorm multiplies its channels with."""
    parameter = norm.args[2] if len(norm.args) > 2 else None
    return torch.ones(()) if parameter is None else tensor(graph_module, parameter).detach().double().clone()


def _channels(covariances: Tensor) -> Iterable[Tensor]:
    """The variances (R) of each group of covariances (*groups, R, R)."""
    return covariances.diagonal(dim1=-2, dim2=-1).flatten(0, -2) if covariances.ndim > 2 else [covariances.diagonal()]


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 3)
