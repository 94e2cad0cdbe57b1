"""Batch norms into the convolution or Linear before them, on a traced graph.

Done for every model that is traced, and on the graph, because only there is it plain that nothing else reads what the
convolution gives. Engines fold too, but not through a quantizer: what is rounded must already be the folded weight.
"""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from martlet.graph.sites import CONVOLUTIONS, aten


def fold_batch_norms_(graph_module: GraphModule) -> int:
    """Folds each batch norm that alone reads a convolution or a Linear into it. Returns how many.

    W' = s W and b' = s (b - mean) + beta, with s = gamma / sqrt(var + eps) per output channel. The layer keeps the name
    of its weight, and gets a bias beside it if it had none. Which ones fold follows from the structure alone, so that a
    model rebuilt without weights folds alike. Left as they are: a batch norm after anything else, a layer whose output
    or weight is used twice.
    """
    folded, spent = 0, set[str]()
    for norm in list(graph_module.graph.nodes):
        if norm.target is aten._native_batch_norm_legit_no_training.default and (layer := _layer_before(norm)):
            spent |= _fold_(graph_module, layer, norm)
            folded += 1
    for node in list(graph_module.graph.nodes):
        if node.op == "get_attr" and node.target in spent and not node.users:
            graph_module.graph.erase_node(node)
            owner, _, leaf = node.target.rpartition(".")
            delattr(graph_module.get_submodule(owner), leaf)
    graph_module.graph.lint()
    graph_module.recompile()
    return folded


def _layer_before(norm: Node) -> Node | None:
    """The convolution or Linear that this batch norm alone reads, if its weight is used there alone."""
    layer, parameters = norm.args[0], [a for a in norm.args[1:5] if a is not None]
    assert isinstance(layer, Node)
    if layer.target is aten.reshape.default and len(layer.users) == 1 and _keeps_last(layer):
        layer = layer.args[0]  # (B, N, C) -> (B N, C) between a Linear and a BatchNorm1d
        assert isinstance(layer, Node)
        if layer.target is not aten.linear.default:
            return None
    elif layer.target is aten.linear.default and len(_shape(layer)) != 2:
        return None  # a Linear's channels are last, a batch norm's second
    if layer.target is not aten.linear.default and layer.target not in CONVOLUTIONS:
        return None
    if layer.target is aten.convolution.default and layer.args[6]:
        return None  # transposed: output channels are the weight's second axis
    own = [a for a in layer.args[1:3] if a is not None]
    alone = len(layer.users) == 1 and all(isinstance(a, Node) and a.op == "get_attr" for a in (*own, *parameters))
    alone = alone and all(user.target is operator.getitem and user.args[1] == 0 for user in norm.users)
    return layer if alone and all(isinstance(a, Node) and len(a.users) == 1 for a in own) else None


def _fold_(graph_module: GraphModule, layer: Node, norm: Node) -> set[str]:
    """Folds one, and names the parameters and buffers that only it can have needed."""
    graph = graph_module.graph
    source, gamma, beta, mean, variance, _, eps = norm.args
    signal, weight, bias, *rest = (*layer.args, None) if len(layer.args) == 2 else layer.args
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    assert isinstance(mean, Node)
    assert isinstance(eps, float)
    values = [_tensor(graph_module, a) for a in (weight, bias, mean, variance)]
    affine = [_tensor(graph_module, a) for a in (gamma, beta)]
    with torch.no_grad():
        new_weight, new_bias = fuse_conv_bn_weights(*values, eps, *affine)  # type: ignore[arg-type]
    trainable = getattr(values[0], "requires_grad", False)
    _set(graph_module, str(weight.target), nn.Parameter(new_weight.detach(), trainable))
    bias_name = str(bias.target) if isinstance(bias, Node) else _bias_name(str(weight.target))
    _set(graph_module, bias_name, nn.Parameter(new_bias.detach(), trainable))
    if bias is None:
        with graph.inserting_before(layer):
            bias = graph.get_attr(bias_name)
        bias.meta = {"val": mean.meta["val"]}  # the shape of a channel: (O,)
        layer.args = (signal, weight, bias, *rest)
    for user in list(norm.users):
        user.replace_all_uses_with(source)
        graph.erase_node(user)
    graph.erase_node(norm)
    names = {str(a.target) for a in (gamma, beta, mean, variance) if isinstance(a, Node)}
    return names | {str(mean.target).removesuffix("running_mean") + "num_batches_tracked"}


def _keeps_last(reshape: Node) -> bool:
    """True of a reshape to two axes that leaves the last one as it is."""
    assert isinstance(reshape.args[0], Node)
    before, after = _shape(reshape.args[0]), _shape(reshape)
    return len(after) == 2 and after[-1] == before[-1]


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape


def _tensor(graph_module: GraphModule, node: object) -> torch.Tensor | None:
    """The parameter or buffer that a node reads."""
    if not isinstance(node, Node):
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


def _bias_name(weight_name: str) -> str:
    owner, dot, name = weight_name.rpartition(".")
    return f"{owner}{dot}{'bias' if name == 'weight' else f'{name}_bias'}"


def _set(graph_module: GraphModule, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(graph_module.get_submodule(owner), leaf, parameter)
