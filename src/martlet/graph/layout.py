"""Exact rewrites of a traced graph into the form that an engine's int8 kernels take.

None needs data and all are decided by the structure alone, so that a model rebuilt without weights is rewritten alike
and then takes a state dict. Nothing is assumed of how a library lays out its heads: channel numbers are sent through
the graph's own operations, and a rewrite is done only where they come out as it needs them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from martlet.graph.rounding import tensor
from martlet.graph.sites import CONVOLUTIONS, PRODUCTS, SHAPE_ONLY, aten, sites, source

PROBE_BATCH = 5
"""Images in a probe; unlike the sizes that stand first in a shape, so that none is taken for the batch."""
SPLITS: dict[object, int] = {
    aten.unbind.int: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.chunk.default: 2,
}
"""Operations that cut a tensor in pieces, and where they take the axis."""
RESHAPES = (aten.reshape.default, aten.unflatten.int)
SOFTMAX = (aten.softmax.int, aten._softmax.default)


@dataclass(frozen=True, eq=False)
class Channels:
    """Where an attention's channels lie in a Linear.

    index: (H, D); the row (of a Linear that gives them) or column (of one that reads them) of head h, channel d.
    """

    linear: Node
    index: Tensor


@dataclass(frozen=True, eq=False)
class Attention:
    """softmax(scale q kᵀ + …) v on the graph, and the Linears around it.

    scores, softmax, values: the nodes of q kᵀ, its softmax, and the product with v.
    q, k, v: the rows that give them; None where something else than one Linear does, or where it is read elsewhere too.
    output: the columns that read `values`; None where not one Linear alone does.
    """

    scores: Node
    softmax: Node
    values: Node
    q: Channels | None
    k: Channels | None
    v: Channels | None
    output: Channels | None

    @property
    def scale(self) -> Node | None:
        """The multiplication of all scores by one number, if that comes straight after them."""
        user = next(iter(self.scores.users))
        if len(self.scores.users) == 1 and user.target is aten.mul.Tensor and user.args[0] is self.scores:
            factor = user.args[1]
            if isinstance(factor, (int, float)) or (isinstance(factor, Node) and factor.target == _buffer_name(self)):
                return user
        return None


def split_projections_(graph_module: GraphModule) -> int:
    """Cuts the output of a Linear that gives several tensors along its channels, before it is given heads.

    `linear -> reshape -> permute -> unbind` becomes `linear -> split -> reshape -> permute` for each piece, which lets
    an engine's fused attention take in the permutations of q, k and v. Where the channels of a piece don't lie side by
    side in the Linear (q, k and v of each head in turn), its rows are reordered in place. Returns how many were cut.
    """
    values, count = _values(graph_module), 0
    for linear in list(graph_module.graph.nodes):
        if linear.target is aten.linear.default and (cut := _find_cut(graph_module, linear, values)):
            _cut_(graph_module, linear, cut)
            count += 1
    _finish(graph_module)
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
    _finish(graph_module)
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
            batch = _call(graph, softmax, aten.sym_size.int, image, 0)
            repeated = _call(graph, softmax, aten.expand.default, mask, [batch, *sizes])
            flat = _call(graph, softmax, aten.reshape.default, repeated, [-1, *sizes[1:]])
            masked = _call(graph, softmax, aten.add.Tensor, scores, flat)
        masked.meta["val"] = result.meta["val"]
        result.replace_all_uses_with(masked)
        graph.eliminate_dead_code()
        count += 1
    _finish(graph_module)
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
                piece = _call(
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
    _finish(graph_module)
    return count


def attentions(graph_module: GraphModule) -> list[Attention]:
    """Every attention, in the order of execution.

    Best after `scale_after_scores_`: a multiplication between a Linear and the scores hides the Linear.
    """
    values, found = _values(graph_module), []
    for site in list(sites(graph_module)):
        if site.kind != "values" or (softmax := _softmax_before(site.node)) is None:
            continue
        candidates = _products_before(softmax)
        if len(candidates) != 1:
            continue
        scores = candidates[0]
        q, k = _rows(graph_module, scores, 0, values), _rows(graph_module, scores, 1, values)
        v = _rows(graph_module, site.node, 1, values)
        if q and k and q.linear is k.linear and torch.isin(q.index, k.index).any():
            q = k = None
        output = _columns(graph_module, site.node, values)
        found.append(Attention(scores, softmax, site.node, q, k, v, output))
    return found


def hold_scale_(graph_module: GraphModule, attention: Attention) -> Tensor:
    """The number that multiplies the scores, made a buffer `attention_scale.<node>` so that it is in the state dict.

    It is inserted, as 1, if the scores aren't multiplied with a number. Does nothing the second time.
    """
    name = _buffer_name(attention)
    node = attention.scale
    factor = 1.0 if node is None else node.args[1]
    if isinstance(factor, Node):
        return tensor(graph_module, factor)
    assert isinstance(factor, (int, float))
    parent, _, leaf = name.rpartition(".")
    if not hasattr(graph_module, parent):
        graph_module.add_submodule(parent, nn.Module())
    dtype = next(p.dtype for p in graph_module.parameters() if p.is_floating_point())
    buffer = torch.tensor(float(factor), dtype=dtype)
    graph_module.get_submodule(parent).register_buffer(leaf, buffer)
    if node is None:
        node = _multiply_(graph_module.graph, attention.scores, 1.0)
    with graph_module.graph.inserting_before(node):
        node.update_arg(1, graph_module.graph.get_attr(name))
    _finish(graph_module)
    return buffer


def scale_channels_(
    graph_module: GraphModule,
    attention: Attention,
    *,
    qk: Tensor | None = None,
    v: Tensor | None = None,
    q_scalar: float = 1.0,
    k_scalar: float = 1.0,
) -> None:
    """Scales q, k and v in the weights that give them and undoes it in those that read them. Logits stay the same.

    Args:
        qk: (H, D) or (H D), positive; each channel of q is multiplied with it, and of k divided by it.
        v: (H, D) or (H D), positive; each channel of v is multiplied with it, and the Linear that reads the output
            divides by it.
        q_scalar, k_scalar: positive; multiply all of q and of k, undone in the number that multiplies the scores,
            which becomes a buffer (`hold_scale_`) if either isn't 1.

    Raises:
        ValueError: a Linear that would have to change isn't known, or a factor isn't positive and finite.
    """
    scaled_qk = qk is not None or q_scalar != 1.0 or k_scalar != 1.0
    if scaled_qk and (attention.q is None or attention.k is None):
        raise ValueError(f"q and k at {attention.scores.name} don't each come from one Linear alone")
    if v is not None and (attention.v is None or attention.output is None):
        raise ValueError(f"v at {attention.values.name} doesn't go from one Linear alone to another one alone")
    factors = [f for f in (qk, v, torch.tensor([q_scalar, k_scalar])) if f is not None]
    if not all(bool((f > 0).all() and f.isfinite().all()) for f in factors):
        raise ValueError(f"factors for {attention.scores.name} must be positive and finite")
    with torch.no_grad():
        if scaled_qk:
            assert attention.q
            assert attention.k
            ones = torch.ones(attention.q.index.shape, dtype=torch.float64)
            by_channel = ones if qk is None else qk.double().reshape(ones.shape)
            _scale_rows_(graph_module, attention.q, by_channel * q_scalar)
            _scale_rows_(graph_module, attention.k, k_scalar / by_channel)
            if (product := q_scalar * k_scalar) != 1.0:
                hold_scale_(graph_module, attention).div_(product)
        if v is not None:
            assert attention.v
            assert attention.output
            by_channel = v.double().reshape(attention.v.index.shape)
            _scale_rows_(graph_module, attention.v, by_channel)
            weight = tensor(graph_module, attention.output.linear.args[1])
            weight[:, attention.output.index] = (weight[:, attention.output.index] / by_channel).to(weight.dtype)


def foldable_layer_norms(graph_module: GraphModule) -> list[Node]:
    """The LayerNorms over channels whose scale and shift nothing but Linears read, in the order of execution."""
    return [node for node in graph_module.graph.nodes if _is_foldable(graph_module, node)]


def fold_layer_norm_affine_(graph_module: GraphModule, norms: Iterable[Node]) -> int:
    """Folds the scale and shift of each LayerNorm into the Linears that read it. Returns how many were folded.

    W (gamma x + beta) + b = W' x + b' with W' = W diag(gamma) and b' = W beta + b. A Linear without a bias gets one
    beside its weight. The LayerNorm only normalizes from then on, and its parameters are gone.

    Raises:
        ValueError: a node isn't one of `foldable_layer_norms`.
    """
    graph, count = graph_module.graph, 0
    for norm in norms:
        if not _is_foldable(graph_module, norm):
            raise ValueError(f"{norm.name} isn't a LayerNorm with a scale that Linears alone read")
        gamma, beta = norm.args[2], norm.args[3] if len(norm.args) > 3 else None
        for linear in list(norm.users):
            weight = tensor(graph_module, linear.args[1])
            with torch.no_grad():
                if beta is not None:
                    shift = (weight.double() @ tensor(graph_module, beta).double()).to(weight.dtype)  # (O,)
                    _add_bias_(graph_module, linear, shift)
                weight.mul_(tensor(graph_module, gamma))
        norm.args = (*norm.args[:2], None, None, *norm.args[4:])
        for parameter in (gamma, beta):
            if isinstance(parameter, Node) and not parameter.users:
                graph.erase_node(parameter)
                owner, _, leaf = str(parameter.target).rpartition(".")
                delattr(graph_module.get_submodule(owner), leaf)
        count += 1
    _finish(graph_module)
    return count


class _Run(Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = value = super().run_node(n)
        return value


def _values(graph_module: GraphModule) -> Mapping[Node, Any]:
    """What every node gives for a few images: tensors with a shape and no data, and whole numbers."""
    image = next(node for node in graph_module.graph.nodes if node.op == "placeholder")
    dtype = next(p.dtype for p in graph_module.parameters() if p.is_floating_point())
    run = _Run(graph_module)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        run.run(torch.empty(PROBE_BATCH, *(int(size) for size in image.meta["val"].shape[1:]), dtype=dtype))
    return run.values


def _apply(node: Node, value: Tensor, values: Mapping[Node, Any]) -> Any:
    """What an operation that only moves values gives for another first argument."""
    args = map_arg(node.args[1:], lambda a: values[a])
    return node.target(value, *args, **map_arg(node.kwargs, lambda a: values[a]))  # type: ignore[operator]


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
        moved = _apply(move, moved, values)
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
    outputs, pieces = _apply(split, moved, values), []
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
    return cut if _is_counting(cut.order) or _owns_parameters(graph_module, linear) else None


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
            for parameter in _parameters(linear):
                rows = tensor(graph_module, parameter)
                rows.copy_(rows[cut.order.long()])
    graph, getitems = graph_module.graph, list(cut.split.users)
    with graph.inserting_before(cut.split):
        parts = _call(graph, linear, aten.split_with_sizes.default, linear, [len(p.rows) for p in cut.pieces], -1)
        for getitem in getitems:
            index = getitem.args[1]
            assert isinstance(index, int)
            piece = cut.pieces[index]
            part = _call(graph, linear, operator.getitem, parts, index)
            if len(piece.shape) != 1:
                part = _reshape(graph, linear, cut.moves[0], part, piece.shape)
            if piece.axes != sorted(piece.axes):
                part = _call(graph, linear, aten.permute.default, part, piece.axes)
            if "val" in getitem.meta:
                part.meta["val"] = getitem.meta["val"]
            getitem.replace_all_uses_with(part)
    for node in (*getitems, cut.split, *reversed(cut.moves)):
        graph.erase_node(node)


def _reshape(graph: Graph, linear: Node, original: Node, part: Node, shape: list[int]) -> Node:
    """Gives the channels a shape, and the axes before them the sizes that the original gives them at any batch."""
    if original.target is aten.unflatten.int:
        return _call(graph, linear, aten.unflatten.int, part, -1, shape)
    sizes = original.args[1]
    assert isinstance(sizes, (list, tuple))
    lead = linear.meta["val"].ndim - 1
    return _call(graph, linear, aten.reshape.default, part, [*sizes[:lead], *shape])


def _call(graph: Graph, like: Node, target: Any, *args: Any) -> Node:
    """A new call that says it comes from the same module as `like`."""
    node = graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    return node


def _multiply_(graph: Graph, node: Node, factor: float) -> Node:
    """Multiplies what a node gives to all its users with a number."""
    with graph.inserting_after(node):
        product = _call(graph, node, aten.mul.Tensor, node, factor)
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


def _softmax_before(product: Node) -> Node | None:
    """The softmax that is a product's left operand."""
    left = product.args[0]
    assert isinstance(left, Node)
    softmax = source(left)
    return softmax if softmax.target in SOFTMAX else None


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
    weight, *bias = _parameters(convolution)
    assert isinstance(weight, Node)
    name = f"{str(weight.target).rpartition('.')[0]}.pieces"
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


def _products_before(softmax: Node) -> list[Node]:
    """The products that reach a softmax through scale, bias and mask."""
    found, pending = dict[Node, None](), list(softmax.all_input_nodes)
    while pending:
        node = pending.pop()
        if node.target in PRODUCTS:
            found[node] = None
        elif node.target in (*SHAPE_ONLY, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor):
            pending += node.all_input_nodes
    return list(found)


def _readers(node: Node, ids: Tensor, values: Mapping[Node, Any]) -> list[tuple[Node, Node, Tensor]]:
    """Who computes with what a node gives: (consumer, the node it reads, the channel number of each value there)."""
    found, pending = [], [(node, ids)]
    while pending:
        node, ids = pending.pop()
        for user in node.users:
            if user.target in SHAPE_ONLY and user.args[0] is node:
                pending.append((user, _apply(user, ids, values)))
            elif user.target is not aten.sym_size.int:
                found.append((user, node, ids))
    return found


def _rows(graph_module: GraphModule, product: Node, position: int, values: Mapping[Node, Any]) -> Channels | None:
    """The rows of the Linear that gives an operand (B, H, N, D), or (B, H, D, N) on the right of scores."""
    operand = product.args[position]
    assert isinstance(operand, Node)
    linear = source(operand)
    if linear.target is not aten.linear.default or not _owns_parameters(graph_module, linear):
        return None
    shape = values[linear].shape
    index, elsewhere = None, []
    for consumer, node, ids in _readers(linear, torch.arange(shape[-1], dtype=torch.int32).expand(shape), values):
        if consumer is not product or node is not operand:
            elsewhere.append(ids.unique())
        elif ids.ndim == 4:
            ids = ids.mT if _contracts_channels(product, position) else ids  # (B, H, N, D)
            index = ids[0, :, 0].long()  # (H, D)
            if not bool((ids == index[:, None]).all()) or len(index.unique()) != index.numel():
                return None
    if index is None or any(bool(torch.isin(index, ids).any()) for ids in elsewhere):
        return None
    return Channels(linear, index)


def _contracts_channels(product: Node, position: int) -> bool:
    """True of k, whose channels come before its tokens; v has them last, as q has."""
    left = product.args[0]
    assert isinstance(left, Node)
    return position == 1 and source(left).target not in SOFTMAX


def _columns(graph_module: GraphModule, product: Node, values: Mapping[Node, Any]) -> Channels | None:
    """The columns of the Linear that alone reads an attention's output (B, H, N, D)."""
    shape = values[product].shape
    if len(shape) != 4:
        return None
    _, heads, _, width = shape
    ids = torch.arange(heads * width, dtype=torch.int32).reshape(heads, 1, width).expand(shape)
    readers = _readers(product, ids, values)
    if len(readers) != 1:
        return None
    linear, operand, ids = readers[0]
    if linear.target is not aten.linear.default or linear.args[0] is not operand:
        return None
    columns = ids[(0,) * (ids.ndim - 1)]  # (C,)
    if not bool((ids == columns).all()) or columns.sort().values.tolist() != list(range(heads * width)):
        return None
    return Channels(linear, columns.argsort().reshape(heads, width)) if _owns_parameters(graph_module, linear) else None


def _scale_rows_(graph_module: GraphModule, channels: Channels, factors: Tensor) -> None:
    """Multiplies rows of a weight, and the values of a bias, with factors (H, D)."""
    for parameter in _parameters(channels.linear):
        rows = tensor(graph_module, parameter)
        picked = rows[channels.index]  # (H, D, …)
        rows[channels.index] = (picked * factors.reshape(*factors.shape, *[1] * (rows.ndim - 1))).to(rows.dtype)


def _buffer_name(attention: Attention) -> str:
    return f"attention_scale.{attention.scores.name}"


def _is_foldable(graph_module: GraphModule, norm: Node) -> bool:
    if norm.target is not aten.layer_norm.default or len(norm.args) < 3 or norm.args[2] is None:
        return False
    linears = all(
        user.target is aten.linear.default and user.args[0] is norm and _owns_parameters(graph_module, user)
        for user in norm.users
    )
    return linears and len(norm.users) > 0 and len(norm.args[1]) == 1  # type: ignore[arg-type]


def _parameters(linear: Node) -> list[object]:
    """The weight of a Linear, and its bias if it has one."""
    return [argument for argument in linear.args[1:3] if argument is not None]


def _owns_parameters(graph_module: GraphModule, linear: Node) -> bool:
    """True if a Linear's weight and bias are parameters that nothing else reads, under whatever name."""
    own = [a for a in _parameters(linear) if isinstance(a, Node) and a.op == "get_attr" and len(a.users) == 1]
    if len(own) != len(_parameters(linear)):
        return False
    memory = {tensor(graph_module, node).untyped_storage().data_ptr() for node in own}
    others = [node for node in graph_module.graph.nodes if node.op == "get_attr" and node not in own]
    return memory.isdisjoint(tensor(graph_module, node).untyped_storage().data_ptr() for node in others)


def _add_bias_(graph_module: GraphModule, linear: Node, shift: Tensor) -> None:
    """Adds to a Linear's bias, made if there is none."""
    weight, *bias = _parameters(linear)
    if bias:
        tensor(graph_module, bias[0]).add_(shift)
        return
    assert isinstance(weight, Node)
    name = str(weight.target).removesuffix("weight") + "bias"
    owner, _, leaf = name.rpartition(".")
    trainable = tensor(graph_module, weight).requires_grad
    setattr(graph_module.get_submodule(owner), leaf, nn.Parameter(shift, trainable))
    with graph_module.graph.inserting_before(linear):
        linear.args = (*linear.args[:2], graph_module.graph.get_attr(name))


def _finish(graph_module: GraphModule) -> None:
    graph_module.graph.lint()
    graph_module.recompile()
