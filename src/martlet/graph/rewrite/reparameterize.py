"""Moves a change of channels between a LayerNorm and the Linears that read it into both. Logits stay the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.errors import NumericsError
from martlet.functional.quantize.reparameterize import ChannelChange, ScaleReparameterization
from martlet.graph.rewrite.shifting import has_biases, norms_before_linears
from martlet.graph.rounding import tensor
from martlet.graph.sites import module_path, sites
from martlet.graph.trace import Walk

Change = Callable[[Tensor, Sequence[Tensor]], ChannelChange]
"""From a LayerNorm's output (R, C) and the weights (O, C) that read it."""

CHANGE = "channel_change"
"""Under which a LayerNorm's node has the change it went through."""


def reparameterize_(graph_module: GraphModule, images: Tensor, change: Change) -> dict[str, int]:
    """Changes every LayerNorm that Linears alone read, and these. Returns how many of how many were changed.

    Where a bias is missing that would have to take up an offset, all stays as it is.

    Raises:
        NumericsError: a LayerNorm gives NaN or infinity.
    """
    norms = norms_before_linears(graph_module)
    todo = [norm for norm in norms if has_biases(norm, *norm.users)]
    changes: dict[Node, ChannelChange] = {}

    class Changes(Walk):
        def run_node(self, n: Node) -> object:
            value = super().run_node(n)
            if n in todo:
                if not bool(torch.isfinite(value).all()):  # type: ignore[arg-type]
                    raise NumericsError(f"{module_path(n)} gives a value that is NaN or infinite")
                weights = [tensor(graph_module, linear.args[1]).detach() for linear in n.users]
                changes[n] = change(value.flatten(0, -2), weights)  # type: ignore[union-attr]
            return value

    with torch.no_grad():
        if todo:
            Changes(graph_module).run(images)
        for norm in todo:
            norm.meta[CHANGE] = changes[norm]
            parameters = [tensor(graph_module, argument) for argument in norm.args[2:4]]
            for parameter, new in zip(parameters, changes[norm].into_norm(*parameters), strict=True):
                parameter.copy_(new)
            for linear in norm.users:
                own = [tensor(graph_module, argument) for argument in linear.args[1:3]]
                for parameter, new in zip(own, changes[norm].into_linear(*own), strict=True):
                    parameter.copy_(new)
    return {"reparameterized": len(todo), "layer_norms": len(norms)}


def ratios(graph_module: GraphModule) -> dict[str, list[float]]:
    """By the nodes of Linears that read a changed LayerNorm, what each of their inputs was divided by."""
    found = {}
    for site in sites(graph_module):
        change = site.node.all_input_nodes[0].meta.get(CHANGE)
        if change is not None:
            found[site.node.name] = change.ratio.tolist()
    return found


def common_grid(norm: Node) -> ScaleReparameterization | None:
    """The change after which the channels of a LayerNorm share one grid, and that grid; None for any other node."""
    change = norm.meta.get(CHANGE)
    return change if isinstance(change, ScaleReparameterization) else None
