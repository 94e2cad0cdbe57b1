"""A second way through a Linear: x W = x R + (x A) B, with A and B of low rank, and R what is left of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from martlet.graph.rounding import NamedNodes, missing, tensor
from martlet.graph.sites import Site, aten, sites

PREFIX = "low_rank."
"""Of the names of the branches' layers."""


def split_linears_(graph_module: GraphModule, rank: int) -> dict[str, int]:
    """Gives every Linear a branch with its weight's greatest singular values, and leaves it the others.

    Returns the rank by the Linear's node, for `add_branches_`; a weight (O, I) has no more than min(O, I). Weights that
    several Linears share stay whole. Logits stay the same.
    """
    ranks: dict[str, int] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for site in sites(graph_module):
        node, weight = site.node, site.node.args[1]
        if node.target is not aten.linear.default or not isinstance(weight, Node) or weight.op != "get_attr":
            continue
        if len(weight.users) != 1:
            continue
        parameter = tensor(graph_module, weight)
        u, s, v = torch.linalg.svd(parameter.detach().double(), full_matrices=False)
        ranks[node.name] = n = min(rank, len(s))
        root = s[:n].sqrt()
        up, down = u[:, :n] * root, root[:, None] * v[:n]  # (O, n), (n, I)
        factors[node.name] = up.to(parameter.dtype), down.to(parameter.dtype)
        with torch.no_grad():
            parameter.copy_(parameter.double() - up @ down)
    add_branches_(graph_module, ranks)
    for name, (up, down) in factors.items():
        graph_module.get_submodule(PREFIX + name).load_state_dict({"up": up, "down": down})
    return ranks


def add_branches_(graph_module: GraphModule, ranks: Mapping[str, int]) -> None:
    """Adds branches of these ranks to Linears, by the names of their nodes, with values to be filled.

    Raises:
        ArtifactError: the graph has no such node.
    """
    nodes = NamedNodes(graph_module)
    for name, rank in ranks.items():
        node = nodes[name]
        outputs, inputs = tensor(graph_module, node.args[1]).shape
        branch = nn.Module()
        branch.up = nn.Parameter(torch.zeros(outputs, rank), requires_grad=False)
        branch.down = nn.Parameter(torch.zeros(rank, inputs), requires_grad=False)
        graph_module.add_submodule(PREFIX + name, branch)
        graph = graph_module.graph
        with graph.inserting_after(node):
            total = graph.call_function(aten.add.Tensor, (node, node))
        node.replace_all_uses_with(total)
        with graph.inserting_before(total):
            down, up = (graph.get_attr(f"{PREFIX}{name}.{part}") for part in ("down", "up"))
            narrow = graph.call_function(aten.linear.default, (node.args[0], down))
            wide = graph.call_function(aten.linear.default, (narrow, up))
        total.args = (node, wide)
        for new in (narrow, wide, total):
            new.meta = {k: v for k, v in node.meta.items() if k == "nn_module_stack"}
        total.meta = dict(node.meta)
    graph_module.graph.lint()
    graph_module.recompile()


def branches(graph_module: GraphModule) -> dict[str, str]:
    """By the names of the Linears that have one, the nodes' names of them."""
    found = {site.name: site.node.name for site in sites(graph_module)}
    layers = dict(graph_module.named_modules())
    return {name: node for name, node in found.items() if PREFIX + node in layers}


def widen_branches_(graph_module: GraphModule, ranks: Mapping[str, int]) -> None:
    """Gives branches more ranks, by the names of their Linears' nodes. What is added has values to be filled.

    Raises:
        ArtifactError: the graph has no such branch.
    """
    layers = dict(graph_module.named_modules())
    for name, rank in ranks.items():
        if PREFIX + name not in layers:
            raise missing(name)
        branch: Any = layers[PREFIX + name]
        more = rank - len(branch.down)
        up, down = functional.pad(branch.up, (0, more)), functional.pad(branch.down, (0, 0, 0, more))
        branch.up, branch.down = (nn.Parameter(part, requires_grad=False) for part in (up, down))


def in_branch(site: Site) -> bool:
    """True of the multiplications of a branch."""
    weight = site.node.args[1]
    return isinstance(weight, Node) and str(weight.target).startswith(PREFIX)
