"""Rotates the channels of a traced graph where that is exact: streams, an attention's q, k and v, pairs and gates.

All that writes a stream is multiplied with a rotation and all that reads it with the inverse. Nothing is left to
compute: a LayerNorm whose scale and shift have moved into its readers commutes with a rotation that keeps the ones
(`functional.rotation`). What a gate gives alone is rotated while the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from martlet.core.errors import NumericsError
from martlet.core.technique import Progress, leave_out
from martlet.functional.quantize.rotation import rotation, standard_basis
from martlet.graph.attention import Attention, Channels, attentions
from martlet.graph.observe import OneBatch, observe
from martlet.graph.probe import call, finish, parameters
from martlet.graph.rounding import NamedNodes, tensor
from martlet.graph.sites import Site, aten, module_path
from martlet.graph.state_space import Gate, Pair
from martlet.graph.streams import Stream, streams

TURN = "turn."
"""Of the names of rotations that are computed while the model runs."""
NOTHING = "nothing was rotated: the model has no LayerNorm and no attention whose channels could be"
"""What a record says then."""


def spread_(graph_module: GraphModule, generator: torch.Generator) -> dict[str, Any]:
    """Multiplies each stream, and v of each head, with a random Hadamard matrix. Logits stay the same.

    Returns how many LayerNorms and values were turned, and how many LayerNorms weren't, by the reason.
    """
    found, values = streams(graph_module), 0
    for stream in found.found:
        fold_norms_(graph_module, stream)
        rotate_stream_(graph_module, stream, rotation(standard_basis(stream.width), generator))
    for attention in attentions(graph_module):
        if attention.v and attention.output:
            heads, width = attention.v.index.shape
            turned = torch.stack([rotation(torch.eye(width), generator) for _ in range(heads)])
            rotate_values_(graph_module, attention, turned)
            values += 1
    norms = sum(len(stream.norms) for stream in found.found)
    record: dict[str, Any] = {"rotated": {"norms": norms, "values": values}, "norms_left": found.left}
    return record if norms or values else leave_out(record, NOTHING)


def fold_norms_(graph_module: GraphModule, stream: Stream) -> None:
    """Moves the scale and shift of a stream's LayerNorms into the layers behind, and LayerScale into those before it.

    Logits stay the same.

    Raises:
        NumericsError: a scale or shift is NaN or infinite.
    """
    for norm in stream.norms:
        if not all(bool(tensor(graph_module, p).isfinite().all()) for p in norm.args[2:4] if p is not None):
            raise NumericsError(f"{module_path(norm)} gives a value that is NaN or infinite")
    with torch.no_grad():
        for writer, scale in stream.writers.items():
            if scale is None:
                continue
            factors = tensor(graph_module, scale).double().flatten()
            for parameter in (tensor(graph_module, p) for p in parameters(writer)):
                parameter.copy_(parameter.double() * factors.reshape(-1, *[1] * (parameter.ndim - 1)))
            tensor(graph_module, scale).fill_(1.0)
        for norm, behind in stream.norms.items():
            scale, shift = ([*norm.args[2:4], None, None])[:2]
            for reader in behind:
                weight = tensor(graph_module, reader.args[1])
                if shift is not None:
                    bias = tensor(graph_module, reader.args[2])
                    bias.copy_(bias.double() + weight.double().flatten(1) @ tensor(graph_module, shift).double())
                if scale is not None:
                    factors = tensor(graph_module, scale).double().reshape(1, -1, *[1] * (weight.ndim - 2))
                    weight.copy_(weight.double() * factors)
            if scale is not None:
                tensor(graph_module, scale).fill_(1.0)
            if shift is not None:
                tensor(graph_module, shift).zero_()


def rotate_stream_(graph_module: GraphModule, stream: Stream, rotation: Tensor) -> None:
    """Multiplies a stream (…, C), whose norms are folded, with a rotation (C, C). Logits stay the same.

    Raises:
        ValueError: the rotation has another size, isn't orthogonal, or doesn't keep the ones.
    """
    rotation = rotation.double()
    if rotation.shape != (stream.width, stream.width):
        raise ValueError(f"a rotation {tuple(rotation.shape)} for a stream of {stream.width} channels")
    if not _is_orthogonal(rotation) or not torch.allclose(rotation.sum(0), torch.ones_like(rotation[0]), atol=1e-8):
        raise ValueError("not a rotation that keeps the ones")
    with torch.no_grad():
        for writer in stream.writers:
            for parameter in (tensor(graph_module, p) for p in parameters(writer)):
                parameter.copy_(_multiplied(parameter, rotation, 0))
        for parameter, axis in stream.parameters.items():
            value = tensor(graph_module, parameter)
            value.copy_(_multiplied(value, rotation, axis))
        for reader in stream.all_readers:
            weight = tensor(graph_module, reader.args[1])
            weight.copy_(_multiplied(weight, rotation, 1))


def rotate_values_(graph_module: GraphModule, attention: Attention, rotation: Tensor) -> None:
    """Multiplies v of each head with a rotation (H, D, D), which the Linear behind undoes. Logits stay the same.

    Raises:
        ValueError: a Linear that would have to change isn't known, or a matrix isn't orthogonal.
    """
    if attention.v is None or attention.output is None:
        raise ValueError(f"v at {attention.values.name} doesn't go from one Linear alone to another one alone")
    if not _is_orthogonal(rotation):
        raise ValueError(f"not a rotation for each head at {attention.values.name}")
    _rotate_rows_(graph_module, attention.v, rotation)
    with torch.no_grad():
        weight, index = tensor(graph_module, attention.output.linear.args[1]), attention.output.index
        weight[:, index] = torch.einsum("ohd,hde->ohe", weight[:, index].double(), rotation.double()).to(weight.dtype)


def rotate_scores_(graph_module: GraphModule, attention: Attention, rotation: Tensor) -> None:
    """Multiplies q and k of each head with the same rotation (H, D, D). Logits stay the same.

    Raises:
        ValueError: a Linear that would have to change isn't known, or a matrix isn't orthogonal.
    """
    if attention.q is None or attention.k is None:
        raise ValueError(f"q and k at {attention.scores.name} don't each come from one Linear alone")
    if not _is_orthogonal(rotation):
        raise ValueError(f"not a rotation for each head at {attention.scores.name}")
    for channels in (attention.q, attention.k):
        _rotate_rows_(graph_module, channels, rotation)


def rotate_pair_(graph_module: GraphModule, pair: Pair, rotation: Tensor) -> None:
    """Multiplies what goes from one layer to the other with a rotation (*groups, R, R). Logits stay the same.

    Raises:
        ValueError: the rotation has another size, or isn't orthogonal.
    """
    if rotation.shape[:-2] != pair.groups or rotation.shape[-1] != len(pair.index) or not _is_orthogonal(rotation):
        raise ValueError(f"not a rotation between {pair.first.name} and {pair.second.name}")
    rotation = rotation.double()
    first, second = pair.weights(graph_module)
    with torch.no_grad():
        first[..., pair.index, :] = (rotation.mT @ first[..., pair.index, :].double()).to(first.dtype)
        second.copy_(second.double() @ rotation)
        if pair.first.node.target is aten.linear.default and len(parameters(pair.first.node)) > 1:
            bias = tensor(graph_module, pair.first.node.args[2])
            bias[pair.index] = (bias[pair.index].double() @ rotation).to(bias.dtype)


def smooth_gate_(graph_module: GraphModule, gate: Gate, factors: Tensor) -> None:
    """Divides what a gate gives by factors (C), which its LayerNorm and the Linear take up. Logits stay the same.

    Raises:
        ValueError: no LayerNorm gives a factor of the gate.
    """
    if gate.norm is None:
        raise ValueError(f"no LayerNorm before {gate.linear.name} that could be scaled")
    with torch.no_grad():
        for parameter in (tensor(graph_module, p) for p in gate.norm.args[2:4] if p is not None):
            parameter.div_(factors)
        tensor(graph_module, gate.linear.args[1]).mul_(factors)


def rotate_gate_(graph_module: GraphModule, gate: Gate, rotation: Tensor) -> None:
    """Multiplies what a gate gives with a rotation (C, C) while the model runs, which its Linear undoes.

    Logits stay the same.

    Raises:
        ValueError: the rotation has another size, or isn't orthogonal.
    """
    weight = tensor(graph_module, gate.linear.args[1])
    if rotation.shape != (weight.shape[1], weight.shape[1]) or not _is_orthogonal(rotation):
        raise ValueError(f"not a rotation of what {gate.linear.name} reads")
    add_turns_(graph_module, [gate.linear.name])
    with torch.no_grad():
        weight.copy_(_multiplied(weight, rotation, 1))
        graph_module.get_parameter(f"{TURN}{gate.linear.name}.weight").copy_(rotation)


def add_turns_(graph_module: GraphModule, linears: Iterable[str]) -> None:
    """Multiplies what Linears read, by the names of their nodes, with matrices (C, C) whose values are to be filled.

    Raises:
        ArtifactError: the graph has no such node.
    """
    nodes, graph = NamedNodes(graph_module), graph_module.graph
    for name in linears:
        linear = nodes[name]
        width = tensor(graph_module, linear.args[1]).shape[1]
        turn = nn.Module()
        turn.weight = nn.Parameter(torch.eye(width), requires_grad=False)
        graph_module.add_submodule(TURN + name, turn)
        with graph.inserting_before(linear):
            matrix = graph.get_attr(f"{TURN}{name}.weight")
            turned = call(graph, linear, aten.matmul.default, linear.args[0], matrix)
        linear.args = (turned, *linear.args[1:])
    finish(graph_module)


def is_turn(site: Site) -> bool:
    """True of the multiplication by a rotation that is computed while the model runs."""
    return any(isinstance(a, Node) and str(a.target).startswith(TURN) for a in site.node.args)


def covariances(
    graph_module: GraphModule,
    nodes: Iterable[Node],
    images: Tensor,
    progress: Progress,
    views: Mapping[Node, Callable[[Tensor], Tensor]] | None = None,
) -> dict[Node, Tensor]:
    """The covariance (C, C) of the channels of each node's tensor (…, C) over all rows, in float64.

    views: by the node, what makes (*groups, rows, C) of a tensor of another shape; there is one (C, C) a group then.

    Raises:
        NumericsError: a value is NaN or infinite.
    """
    sums: dict[Node, tuple[int, Tensor, Tensor]] = {}

    def look(node: Node, value: Tensor) -> None:
        if not bool(value.isfinite().all()):
            raise NumericsError(f"{module_path(node)} gives a value that is NaN or infinite")
        rows = (views[node](value) if views and node in views else value.flatten(0, -2)).double()
        count, total, square = sums.get(node, (0, torch.zeros(()), torch.zeros(())))
        sums[node] = count + rows.shape[-2], total + rows.sum(-2), square + rows.mT @ rows

    watch = {node: (lambda value, node=node: look(node, value)) for node in nodes}
    if watch:
        observe(graph_module, OneBatch(images), watch, progress, "observe channels")
    means = {node: total / count for node, (count, total, _) in sums.items()}
    return {
        node: square / count - means[node][..., :, None] * means[node][..., None, :]
        for node, (count, _, square) in sums.items()
    }


def _multiplied(value: Tensor, rotation: Tensor, axis: int) -> Tensor:
    """A tensor with each vector along one axis multiplied with the rotation."""
    return (value.double().movedim(axis, -1) @ rotation).movedim(-1, axis)


def _rotate_rows_(graph_module: GraphModule, channels: Channels, rotation: Tensor) -> None:
    """Multiplies what a Linear gives in each head's channels."""
    with torch.no_grad():
        for parameter in parameters(channels.linear):
            rows = tensor(graph_module, parameter)
            picked = rows[channels.index].double()  # (H, D, …)
            rows[channels.index] = torch.einsum("hd...,hde->he...", picked, rotation.double()).to(rows.dtype)


def _is_orthogonal(matrices: Tensor) -> bool:
    size = matrices.shape[-1]
    identity = torch.eye(size, dtype=torch.float64)
    return matrices.shape[-2] == size and torch.allclose(matrices.double().mT @ matrices.double(), identity, atol=1e-8)
