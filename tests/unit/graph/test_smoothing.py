"""Smoothing keeps the logits and lowers the error of the Linears that read a LayerNorm, and nothing else changes."""

import copy

import pytest
import torch
from small_vits import VITS, Noise, error, logits, node_of, traced
from torch.fx import GraphModule

from martlet.core.technique import silent
from martlet.functional.quantize.affine import affine_parameters, dequantize, quantize
from martlet.graph.observe import observe
from martlet.graph.rewrite.smoothing import smooth_
from martlet.graph.sites import aten

CHANNEL = 4


def with_outlier(name: str) -> GraphModule:
    """One channel of the first block's first LayerNorm is 50 times as large as the others."""
    graph_module = traced(name)
    with torch.no_grad():
        graph_module.get_parameter("blocks.0.norm1.weight")[CHANNEL] = 50.0
    return graph_module


def smooth(graph_module: GraphModule) -> int:
    return smooth_(graph_module, Noise(), 0, silent)


def changed(before: dict[str, torch.Tensor], graph_module: GraphModule) -> set[str]:
    return {name for name, value in graph_module.state_dict().items() if not torch.equal(value, before[name])}


def error_in_8_bits(graph_module: GraphModule, name: str) -> float:
    """Relative error of a Linear whose input and weight are rounded."""
    linear, seen = node_of(graph_module, name), []
    observe(graph_module, Noise(), {linear.args[0]: seen.append}, silent, "test")  # type: ignore[dict-item]
    x, weight = torch.cat(seen), graph_module.get_parameter(name)
    scale, zero = affine_parameters(x.min(), x.max(), torch.uint8, False)
    steps, zeros = affine_parameters(-weight.abs().amax(1), weight.abs().amax(1), torch.int8, True)
    rounded = dequantize(quantize(x, scale, zero), scale, zero)
    return error(x @ weight.T, rounded @ dequantize(quantize(weight, steps, zeros, 0), steps, zeros, 0).T)


@pytest.mark.parametrize("name", VITS)
def test_logits_stay_and_the_error_falls(name):
    graph_module, weight = with_outlier(name), "blocks.0.attn.qkv.weight"
    start = {k: v.clone() for k, v in graph_module.state_dict().items()}
    exact, rough = logits(copy.deepcopy(graph_module).double()), error_in_8_bits(graph_module, weight)
    assert smooth(graph_module) >= 1
    assert {"blocks.0.norm1.weight", "blocks.0.norm1.bias", weight} <= changed(start, graph_module)
    assert error(exact, logits(copy.deepcopy(graph_module).double())) < 1e-5  # factors round in float32
    assert error_in_8_bits(graph_module, weight) < rough / 2
    factors = graph_module.get_parameter(weight)[0] / start[weight][0]
    undone = start["blocks.0.norm1.weight"] / graph_module.get_parameter("blocks.0.norm1.weight")
    assert torch.allclose(factors, undone, rtol=1e-5)
    assert factors.argmax() == CHANNEL
    with torch.no_grad():
        graph_module.get_parameter(weight).mul_(factors)  # once too often
    assert error(exact, logits(copy.deepcopy(graph_module).double())) > 1e-3


def test_only_layer_norms_that_linears_alone_read():
    graph_module = traced("class token")
    start = {k: v.clone() for k, v in graph_module.state_dict().items()}
    smooth(graph_module)
    blocks = {"norm1.weight", "norm1.bias", "attn.qkv.weight", "norm2.weight", "norm2.bias", "mlp.fc1.weight"}
    assert changed(start, graph_module) <= {f"blocks.0.{name}" for name in blocks}  # of the last, one token is taken


def test_a_layer_norm_without_a_scale_is_left_alone():
    graph_module = with_outlier("class token")
    for node in graph_module.graph.nodes:
        if node.target is aten.layer_norm.default:
            node.args = (*node.args[:2], None, None, *node.args[4:])
    graph_module.recompile()
    before = logits(graph_module)
    assert smooth(graph_module) == 0
    assert torch.equal(logits(graph_module), before)


def test_a_model_without_a_layer_norm_is_left_alone():
    graph_module = traced("convolutions")
    start = {k: v.clone() for k, v in graph_module.state_dict().items()}
    assert smooth(graph_module) == 0
    assert changed(start, graph_module) == set()


def test_it_is_deterministic_and_follows_its_seed():
    first, second = with_outlier("no class token"), with_outlier("no class token")
    assert smooth(first) == smooth(second)
    assert changed(dict(first.state_dict()), second) == set()
