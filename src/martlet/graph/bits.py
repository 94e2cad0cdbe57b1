"""The bit map: how many bits every kind of tensor of a graph is kept in. Papers differ silently in exactly this."""

from __future__ import annotations

from collections import Counter

from torch.fx import GraphModule, Node

from martlet.graph.rewrite.low_rank import in_branch
from martlet.graph.sites import SHAPE_ONLY, Site, aten, sites
from martlet.nn.integer import IntegerLayerNorm, ShiftGELU, Shiftmax
from martlet.nn.quantizers import ChannelScale

ACTIVATIONS = {
    aten.layer_norm.default: "layer_norm_output",
    aten.gelu.default: "gelu_output",
    aten.softmax.int: "softmax_output",
    IntegerLayerNorm: "layer_norm_output",
    ShiftGELU: "gelu_output",
}


def bit_map(graph_module: GraphModule, floating: str) -> dict[str, str]:
    """Tensor kind to `8`, or to `8 (47), bf16 (2)` where kinds differ; `floating` names what isn't rounded.

    What isn't evenly spaced goes by its format: `nf4`, `fp8_e4m3`.
    """
    counts: dict[str, Counter[str]] = {}
    found = list(sites(graph_module))
    for site in found:
        for kind, bits in _operands(graph_module, site, floating):
            counts.setdefault(kind, Counter())[bits] += 1
    weighted = [site for site in found if site.weight is not None and not in_branch(site)]
    if weighted:
        for name, site in (("first_layer", weighted[0]), ("last_layer", weighted[-1])):
            bits = dict(_operands(graph_module, site, floating))
            counts[name] = Counter([", ".join(f"{kind.rpartition('_')[2]} {b}" for kind, b in sorted(bits.items()))])
    for node in graph_module.graph.nodes:
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Shiftmax):
            counts.setdefault("softmax_output", Counter())[str(module.bits)] += 1
        if kind := ACTIVATIONS.get(type(module) if module else node.target):
            for user in node.users:
                counts.setdefault(kind, Counter())[_bits_after(graph_module, user, floating)] += 1
    residual = [
        _bits_before(graph_module, operand, floating)
        for add in _additions(graph_module)
        for operand in add.all_input_nodes
    ]
    counts["residual"] = Counter(residual or [floating])
    return {kind: _text(count) for kind, count in counts.items()}


def rounded_operands(graph_module: GraphModule, node: Node) -> bool:
    """Whether both operands of a multiplication are rounded to integers."""
    operands = [operand for operand in node.args if isinstance(operand, Node)][:2]
    return len(operands) == 2 and all(_bits_before(graph_module, each, "").isdigit() for each in operands)


def _additions(graph_module: GraphModule) -> list[Node]:
    """The additions of two tensors that both depend on the image."""
    varying, found = set[Node](), []
    for node in graph_module.graph.nodes:
        inputs = [operand in varying for operand in node.all_input_nodes]
        if node.op == "placeholder" or (any(inputs) and node.target is not aten.sym_size.int):
            varying.add(node)
        if node.target is aten.add.Tensor and len(inputs) == 2 and all(inputs):
            found.append(node)
    return found


def _text(count: Counter[str]) -> str:
    if len(count) == 1:
        return next(iter(count))
    return ", ".join(f"{bits} ({n})" for bits, n in count.most_common())


def _operands(graph_module: GraphModule, site: Site, floating: str) -> list[tuple[str, str]]:
    names = {"scores": ("q", "k"), "values": ("attention_probabilities", "v")}.get(
        site.kind, (f"{site.kind}_input",) * 2
    )
    pairs = []
    for position in (0, 1):
        operand = site.node.args[position]
        assert isinstance(operand, Node)
        kind = f"{site.kind}_weight" if position == site.weight else names[position]
        pairs.append((kind, _bits_before(graph_module, operand, floating)))
    return pairs


def _bits_before(graph_module: GraphModule, node: Node, floating: str) -> str:
    while node.target in SHAPE_ONLY and isinstance(node.args[0], Node):
        node = node.args[0]
    return _bits(graph_module, node, floating)


def _bits_after(graph_module: GraphModule, node: Node, floating: str) -> str:
    while (node.target in SHAPE_ONLY or _is_channel_scale(graph_module, node)) and len(node.users) == 1:
        node = next(iter(node.users))
    return _bits(graph_module, node, floating)


def _is_channel_scale(graph_module: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), ChannelScale)


def _bits(graph_module: GraphModule, node: Node, floating: str) -> str:
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        bits = getattr(module, "format", None) or getattr(module, "bits", None)
        if bits is not None:
            return str(bits)
    return floating
