"""Rotates the channels of a traced graph where that is exact: residual streams, and each attention's q, k and v.

All that writes a stream is multiplied with a rotation and all that reads it with the inverse. Nothing is left to
compute: a LayerNorm whose scale and shift have moved into its readers commutes with a rotation that keeps the ones
(`functional.rotation`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.errors import NumericsError
from martlet.core.technique import Progress
from martlet.functional.quantize.rotation import rotation, standard_basis
from martlet.graph.attention import Attention, Channels, attentions
from martlet.graph.observe import OneBatch, observe
from martlet.graph.probe import parameters
from martlet.graph.rounding import tensor
from martlet.graph.sites import module_path
from martlet.graph.streams import Stream, streams


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
    return {"rotated": {"norms": norms, "values": values}, "norms_left": found.left}


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


def covariances(
    graph_module: GraphModule, nodes: Iterable[Node], images: Tensor, progress: Progress
) -> dict[Node, Tensor]:
    """The covariance (C, C) of the channels of each node's tensor (…, C) over all rows, in float64.

    Raises:
        NumericsError: a value is NaN or infinite.
    """
    sums: dict[Node, tuple[int, Tensor, Tensor]] = {}

    def look(node: Node, value: Tensor) -> None:
        if not bool(value.isfinite().all()):
            raise NumericsError(f"{module_path(node)} gives a value that is NaN or infinite")
        rows = value.flatten(0, -2).double()
        count, total, square = sums.get(node, (0, torch.zeros(()), torch.zeros(())))
        sums[node] = count + len(rows), total + rows.sum(0), square + rows.T @ rows

    watch = {node: (lambda value, node=node: look(node, value)) for node in nodes}
    if watch:
        observe(graph_module, OneBatch(images), watch, progress, "observe channels")
    means = {node: total / count for node, (count, total, _) in sums.items()}
    return {node: s / count - torch.outer(means[node], means[node]) for node, (count, _, s) in sums.items()}


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
