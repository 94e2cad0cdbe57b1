"""Exact rewrites of a traced graph into the form that an engine's int8 kernels take.

None needs data and all are decided by the structure alone, so that a model rebuilt without weights is rewritten alike
and then takes a state dict.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from martlet.graph.probe import call, finish, owns_parameters, parameters, route, shapes
from martlet.graph.rounding import tensor
from martlet.graph.sites import CONVOLUTIONS, SHAPE_ONLY, SOFTMAX, aten, sites

SPLITS: dict[object, int] = {
    aten.unbind.int: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.chunk.default: 2,
}
"""Operations that cut a tensor in pieces, and where they take the axis."""
RESHAPES = (aten.reshape.default, aten.unflatten.int)
PIECES = "pieces"
"""The module that holds the pieces of a convolution that was cut."""


def split_projections_(graph_module: GraphModule) -> int:
    """Cuts the output of a Linear that gives several tensors along its channels, before it is given heads.

    `linear -> reshape -> permute -> unbind` becomes `linear -> split -> reshape -> permute` for each piece, which lets
    an engine's fused attention take in the permutations of q, k and v. Where the channels of a piece don't lie side by
    side in the Linear (q, k and v of each head in turn), its rows are reordered in place. Returns how many were cut.
    """
    values, count = shapes(graph_module), 0
    for linear in list(graph_module.graph.nodes):
        if linear.target is aten.linear.default and (cut := _find_cut(graph_module, linear, values)):
            _cut_(graph_module, linear, cut)
            count += 1
    finish(graph_module)
    return count


def scale_after_scores_(graph_module: GraphModule) -> int:
    """Moves a number that q or k is multiplied with behind their product. Returns how many were moved.

    (c q) kᵀ = c (q kᵀ); q then uses the whole of its integer grid, and the engine's fused attention scales for free.
    """
    graph, count = graph_module.graph, 0
    for scores in [site.node for site in sites(graph_module) if site.kind == "scores"]:
        for operand in scores.args[:2]:
            assert isinstance(operand, Node)
            if (scaling := _scaling(operand)) is None:
                continue
            number = scaling.args[1]
            assert isinstance(number, (int, float))
            factor = number if scaling.target is aten.mul.Tensor else 1 / number
            scaling.replace_all_uses_with(scaling.args[0])  # type: ignore[arg-type]
            graph.erase_node(scaling)
            _multiply_(graph, scores, factor)
            count += 1
    finish(graph_module)
    return count


def flatten_masks_(graph_module: GraphModule) -> int:
    """Adds a mask of windows to the scores as they are, not to a view of them. Returns how many were.

    softmax(reshape(reshape(s) + mask)) = softmax(s + reshape(mask)): scores (B W, H, N, N) of W windows take a mask
    (1, W, H or 1, N, N), repeated for every image; a view in between would keep an engine from fusing the attention.
    """
    graph, count = graph_module.graph, 0
    image = next(node for node in graph.nodes if node.op == "placeholder")
    for softmax in [node for node in graph.nodes if node.target in SOFTMAX]:
        found = _masked_view(softmax.args[0])
        if found is None:
            continue
        scores, mask, result = found
        sizes = mask.meta["val"].shape[1:]
        with graph.inserting_before(result):
            batch = call(graph, softmax, aten.sym_size.int, image, 0)
            repeated = call(graph, softmax, aten.expand.default, mask, [batch, *sizes])
            flat = call(graph, softmax, aten.reshape.default, repeated, [-1, *sizes[1:]])
            masked = call(graph, softmax, aten.add.Tensor, scores, flat)
        masked.meta["val"] = result.meta["val"]
        result.replace_all_uses_with(masked)
        graph.eliminate_dead_code()
        count += 1
    finish(graph_module)
    return count


def split_convolutions_(graph_module: GraphModule) -> int:
    """Makes a convolution whose output is cut along its channels one convolution for each piece. Returns how many.

    An engine that cuts may change the layout of the whole tensor for it. Weights are `<name>.pieces.<i>.weight` then.
    """
    graph, count = graph_module.graph, 0
    for convolution in [node for node in graph.nodes if node.target in CONVOLUTIONS]:
        split = next(iter(convolution.users))
        weight, bias = convolution.args[1], convolution.args[2] if len(convolution.args) > 2 else None
        groups = convolution.args[8 if convolution.target is aten.convolution.default else 6 :][:1]
        if len(convolution.users) != 1 or split.target is not aten.split_with_sizes.default or groups not in ((), (1,)):
            continue
        sizes, axis = split.args[1], split.args[2] if len(split.args) > 2 else 0
        own = all(isinstance(p, Node) and p.op == "get_attr" and len(p.users) == 1 for p in (weight, bias) if p)
        if axis != 1 or not own or any(user.target is not operator.getitem for user in split.users):
            continue
        pieces = _pieces(graph_module, convolution, [int(size) for size in sizes])  # type: ignore[union-attr]
        for getitem in list(split.users):
            owner = pieces[getitem.args[1]]  # type: ignore[index]
            with graph.inserting_before(getitem):
                parameters = [graph.get_attr(f"{owner}.weight"), graph.get_attr(f"{owner}.bias") if bias else None]
                piece = call(
                    graph, convolution, convolution.target, convolution.args[0], *parameters, *convolution.args[3:]
                )
            piece.meta["val"] = getitem.meta["val"]
            getitem.replace_all_uses_with(piece)
            graph.erase_node(getitem)
        for node in (split, convolution):
            graph.erase_node(node)
        for parameter in (weight, bias):
            if isinstance(parameter, Node):
                graph.erase_node(parameter)
                owner, _, leaf = str(parameter.target).rpartition(".")
                delattr(graph_module.get_submodule(owner), leaf)
        count += 1
    finish(graph_module)
    return count


def uncut(name: str) -> str:
    """The name that a site had before its convolution was cut."""
    return name.partition(f".{PIECES}.")[0]


@dataclass(frozen=True)
class _Piece:
    """What a piece is made of: rows of the Linear (C_i), their shape behind the leading axes, and its permutation."""

    rows: Tensor
    shape: list[int]
    axes: list[int]


@dataclass(frozen=True)
class _Cut:
    """moves: what lies between the Linear and `split`: a reshape, if there is one, and permutations."""

    moves: list[Node]
    split: Node
    pieces: list[_Piece]

    @property
    def order(self) -> Tensor:
        return torch.cat([piece.rows for piece in self.pieces])


def _find_cut(graph_module: GraphModule, linear: Node, values: Mapping[Node, Any]) -> _Cut | None:
    """How to cut a Linear's output, if a cut along the channels gives the same tensors."""
    moves, split = _moves_before_split(linear)
    if split is None or not all(user.target is operator.getitem for user in split.users):
        return None
    if not moves and split.target is aten.split_with_sizes.default:
        return None  # cut as wanted
    *lead, channels = values[linear].shape
    ids = torch.arange(channels, dtype=torch.int32).expand(*lead, channels)
    moved, shape, axes = ids, [channels], list(range(ids.ndim))
    for move in moves:
        moved = route(move, moved, values)
        if move.target in RESHAPES:
            if list(moved.shape[: len(lead)]) != lead:
                return None
            shape, axes = list(moved.shape[len(lead) :]), list(range(moved.ndim))
        else:
            axes = _permute(axes, move)
    position = SPLITS[split.target]
    dim = split.args[position] if len(split.args) > position else split.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    axis = axes[dim] - len(lead)
    if axis < 0:
        return None  # cuts images or tokens
    outputs, pieces = route(split, moved, values), []
    for output in outputs:
        if split.target is aten.unbind.int:
            own_shape = shape[:axis] + shape[axis + 1 :]
            own_axes = [a - (a > axes[dim]) for a in axes if a != axes[dim]]
        else:
            own_shape, own_axes = [*shape[:axis], output.shape[dim], *shape[axis + 1 :]], axes
        pieces.append(_Piece(output.unique(), own_shape, own_axes))
    cut = _Cut(moves, split, pieces)
    parts = ids[..., cut.order.long()].split([len(piece.rows) for piece in pieces], -1)
    for part, piece, output in zip(parts, pieces, outputs, strict=True):
        if not torch.equal(part.reshape(*lead, *piece.shape).permute(piece.axes), output):
            return None
    return cut if _is_counting(cut.order) or owns_parameters(graph_module, linear) else None


def _moves_before_split(linear: Node) -> tuple[list[Node], Node | None]:
    """What lies between a Linear and the only split of its output; None if there is no split."""
    moves, node = [], linear
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target in SPLITS:
            return moves, node
        if node.target not in (aten.permute.default, aten.transpose.int) and (node.target not in RESHAPES or moves):
            break
        moves.append(node)
    return [], None


def _permute(axes: list[int], move: Node) -> list[int]:
    """Which axes stand where after a `permute` or `transpose`."""
    if move.target is aten.permute.default:
        dims = move.args[1]
        assert isinstance(dims, (list, tuple))
        return [axes[int(d)] for d in dims]  # type: ignore[arg-type]
    axes = list(axes)
    first, second = (int(d) for d in move.args[1:3])  # type: ignore[arg-type]
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def _is_counting(order: Tensor) -> bool:
    return order.tolist() == list(range(len(order)))


def _cut_(graph_module: GraphModule, linear: Node, cut: _Cut) -> None:
    if not _is_counting(cut.order):
        with torch.no_grad():
            for parameter in parameters(linear):
                rows = tensor(graph_module, parameter)
                rows.copy_(rows[cut.order.long()])
    graph, getitems = graph_module.graph, list(cut.split.users)
    with graph.inserting_before(cut.split):
        parts = call(graph, linear, aten.split_with_sizes.default, linear, [len(p.rows) for p in cut.pieces], -1)
        for getitem in getitems:
            index = getitem.args[1]
            assert isinstance(index, int)
            piece = cut.pieces[index]
            part = call(graph, linear, operator.getitem, parts, index)
            if len(piece.shape) != 1:
                part = _reshape(graph, linear, cut.moves[0], part, piece.shape)
            if piece.axes != sorted(piece.axes):
                part = call(graph, linear, aten.permute.default, part, piece.axes)
            if "val" in getitem.meta:
                part.meta["val"] = getitem.meta["val"]
            getitem.replace_all_uses_with(part)
    for node in (*getitems, cut.split, *reversed(cut.moves)):
        graph.erase_node(node)


def _reshape(graph: Graph, linear: Node, original: Node, part: Node, shape: list[int]) -> Node:
    """Gives the channels a shape, and the axes before them the sizes that the original gives them at any batch."""
    if original.target is aten.unflatten.int:
        return call(graph, linear, aten.unflatten.int, part, -1, shape)
    sizes = original.args[1]
    assert isinstance(sizes, (list, tuple))
    lead = linear.meta["val"].ndim - 1
    return call(graph, linear, aten.reshape.default, part, [*sizes[:lead], *shape])


def _multiply_(graph: Graph, node: Node, factor: float) -> Node:
    """Multiplies what a node gives to all its users with a number."""
    with graph.inserting_after(node):
        product = call(graph, node, aten.mul.Tensor, node, factor)
    if "val" in node.meta:
        product.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)
    return product


def _scaling(operand: Node) -> Node | None:
    """The multiplication with, or division by, a number that an operand has behind it."""
    node = operand
    while len(node.users) == 1 and isinstance(node.args[0] if node.args else None, Node):
        if node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], (int, float)):
            return node
        if node.target not in SHAPE_ONLY:
            break
        node = node.args[0]
        assert isinstance(node, Node)
    return None


def _masked_view(last: object) -> tuple[Node, Node, Node] | None:
    """(scores, mask, last) of last = reshape(reshape(scores) + mask), scores (B W, H, N, N), mask (1, W, …, N, N)."""
    nodes = []
    for target in (aten.reshape.default, aten.add.Tensor, aten.reshape.default):
        if not isinstance(last, Node) or last.target is not target or len(last.users) != 1:
            return None
        nodes.append(last)
        last = last.args[0]
    result, added, view = nodes
    scores, mask = last, added.args[1]
    if not isinstance(scores, Node) or not isinstance(mask, Node):
        return None
    before, wide, after = (node.meta["val"].shape for node in (scores, view, result))
    shape = mask.meta["val"].shape
    fits = len(shape) == len(wide) == 5 and len(before) == 4 and shape[:2] == (1, wide[1]) and before[1:] == after[1:]
    return (scores, mask, result) if fits and before[1:] == wide[2:] else None


def _pieces(graph_module: GraphModule, convolution: Node, sizes: list[int]) -> list[str]:
    """Cuts a convolution's parameters along its output channels. Returns the names of the owners of the pieces."""
    weight, *bias = parameters(convolution)
    assert isinstance(weight, Node)
    name = f"{str(weight.target).rpartition('.')[0]}.{PIECES}"
    graph_module.add_submodule(name, nn.Module())
    owners = []
    for i in range(len(sizes)):
        owner = nn.Module()
        rows = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
        for leaf, parameter in zip(("weight", "bias"), (weight, *bias), strict=False):
            old = tensor(graph_module, parameter)
            owner.register_parameter(leaf, nn.Parameter(old.detach()[rows].clone(), old.requires_grad))
        owners.append(f"{name}.{i}")
        graph_module.add_submodule(owners[-1], owner)
    return owners
