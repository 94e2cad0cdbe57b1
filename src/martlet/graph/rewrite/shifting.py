"""Centres the channels of a tensor around zero and undoes it in the biases that follow. Logits stay the same.

Source: Wei et al., Outlier Suppression+, 2023, arXiv 2304.09145: a LayerNorm's output
is shifted by the middle of each channel's range. Ours is the same for v: each row of the softmax sums to 1, so what is
taken from v comes back in the bias of the Linear that reads the attention's output; the mean is taken, because it is
what the rounding of many small attention weights to zero loses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.technique import Batches, Progress
from martlet.graph.attention import attentions
from martlet.graph.observe import observe
from martlet.graph.probe import owns_parameters
from martlet.graph.rounding import tensor
from martlet.graph.sites import aten


class _Channels:
    """Range and mean of each channel of a tensor (..., C)."""

    def __init__(self) -> None:
        self.low = self.high = self.total = torch.zeros(0)
        self.rows = 0

    def look(self, value: Tensor) -> None:
        flat = value.flatten(0, -2)  # (R, C)
        low, high = torch.aminmax(flat, dim=0)
        first = self.rows == 0
        self.low = low if first else torch.minimum(self.low, low)
        self.high = high if first else torch.maximum(self.high, high)
        self.total = flat.double().sum(0) if first else self.total + flat.double().sum(0)
        self.rows += len(flat)

    @property
    def middle(self) -> Tensor:
        return (self.low.double() + self.high.double()) / 2

    @property
    def mean(self) -> Tensor:
        return self.total / self.rows


def shift_(graph_module: GraphModule, images: Batches, progress: Progress) -> int:
    """Centres each LayerNorm's output that only Linears read, and each attention's v. Returns how many it centred.

    Where a bias is missing that would have to take up the shift, the tensor stays as it is.
    """
    norms = [n for n in norms_before_linears(graph_module) if has_biases(n, *n.users)]
    found = [a for a in attentions(graph_module) if a.v and a.output and has_biases(a.v.linear, a.output.linear)]
    seen = {node: _Channels() for node in (*norms, *(a.v.linear for a in found if a.v))}
    watch: dict[Node, Callable[[Tensor], None]] = {node: s.look for node, s in seen.items()}
    if watch:
        observe(graph_module, images, watch, progress, "observe channels")
    with torch.no_grad():
        for norm in norms:
            shift = seen[norm].middle  # (C,)
            _subtract_(tensor(graph_module, norm.args[3]), shift)
            for linear in norm.users:
                _absorb_(graph_module, linear, shift)
        for attention in found:
            assert attention.v
            assert attention.output
            rows, columns = attention.v.index.flatten(), attention.output.index.flatten()
            mean = seen[attention.v.linear].mean[rows]
            shift = torch.zeros_like(seen[attention.v.linear].mean).index_put((rows,), mean)
            _subtract_(tensor(graph_module, attention.v.linear.args[2]), shift)
            linear = attention.output.linear
            width = tensor(graph_module, linear.args[1]).shape[1]
            _absorb_(graph_module, linear, mean.new_zeros(width).index_put((columns,), mean))
    return len(norms) + len(found)


def norms_before_linears(graph_module: GraphModule) -> list[Node]:
    """The LayerNorms over channels, with a scale of their own, that nothing but Linears read, in their order."""
    norms = []
    for node in graph_module.graph.nodes:
        if node.target is not aten.layer_norm.default or len(node.args) < 3 or node.args[2] is None:
            continue
        linears = [user.target is aten.linear.default and user.args[0] is node for user in node.users]
        if (
            linears
            and all(linears)
            and len(node.args[1]) == 1
            and all(owns_parameters(graph_module, u) for u in node.users)
        ):
            norms.append(node)
    return norms


def has_biases(*nodes: Node) -> bool:
    """True if each has a bias of its own: the last of three arguments of a Linear, of four of a LayerNorm."""
    biases = [node.args[3 if node.target is not aten.linear.default else 2 :][:1] for node in nodes]
    return all(b and isinstance(b[0], Node) and b[0].op == "get_attr" and len(b[0].users) == 1 for b in biases)


def _subtract_(parameter: Tensor, shift: Tensor) -> None:
    parameter.copy_(parameter.double() - shift)


def _absorb_(graph_module: GraphModule, linear: Node, shift: Tensor) -> None:
    """Adds W shift to a Linear's bias."""
    _subtract_(tensor(graph_module, linear.args[2]), -tensor(graph_module, linear.args[1]).double() @ shift)
