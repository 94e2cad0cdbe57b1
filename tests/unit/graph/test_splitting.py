"""Splitting keeps the logits, lowers the rounding error, and is rebuilt from a record and a state dict."""

import copy
import json

import pytest
import torch
from small_vits import VITS, Noise, error, logits, node_of, traced
from torch import Tensor
from torch.fx import GraphModule

from martlet.core.technique import silent
from martlet.functional.quantize.affine import affine_parameters, dequantize, quantize
from martlet.graph.observe import observe
from martlet.graph.rewrite.splitting import restore_, split_
from martlet.nn.quantizers import ChannelScale

CHANNEL = 5


def with_outlier(name: str, seed: int = 0, block: int = 0) -> GraphModule:
    """One hidden channel of one MLP gives 60 where the others give about 1, and its weights are small."""
    graph_module = traced(name, seed)
    mlp = graph_module.get_submodule(f"blocks.{block}.mlp")
    with torch.no_grad():
        mlp.fc1.bias[CHANNEL] = 60.0  # type: ignore[union-attr, index]
        mlp.fc2.weight[:, CHANNEL] *= 0.1  # type: ignore[union-attr, index]
    return graph_module


def split(graph_module: GraphModule) -> list[list[object]]:
    return split_(graph_module, Noise(), 0, silent)


def error_of_rounded_input(graph_module: GraphModule, name: str) -> float:
    """Squared error of a Linear whose input is rounded to the u8 grid over its range."""
    linear, seen = node_of(graph_module, name), []
    observe(graph_module, Noise(), {linear.args[0]: seen.append}, silent, "test")  # type: ignore[dict-item]
    x = torch.cat(seen)
    scale, zero = affine_parameters(x.min(), x.max(), torch.uint8, False)
    return float(((dequantize(quantize(x, scale, zero), scale, zero) - x) @ graph_module.get_parameter(name).T).norm())


@pytest.mark.parametrize("name", VITS)
def test_logits_stay(name):
    graph_module = with_outlier(name)
    twin, before = copy.deepcopy(graph_module), logits(graph_module.double())
    record = split(twin)
    assert len(record) == 1
    assert error(before, logits(twin.double())) < 1e-6  # factors are computed in float32
    [scale] = [module for module in twin.modules() if isinstance(module, ChannelScale)]
    scale.factor.fill_(1.0)
    assert error(before, logits(twin)) > 1e-2


def test_only_the_channel_with_outliers_is_split_and_into_equal_parts():
    graph_module = with_outlier("no class token", block=1)
    [[name, width]] = split(graph_module)
    weight = "blocks.1.mlp.fc2.weight"
    assert name == node_of(graph_module, weight).name
    assert width in (48 + 16, 48 + 32)
    assert graph_module.get_parameter(weight).shape == (12, width)
    assert graph_module.get_parameter("blocks.1.mlp.fc1.weight").shape == (width, 12)
    assert graph_module.get_parameter("blocks.0.mlp.fc2.weight").shape == (12, 48)
    [scale] = [module for module in graph_module.modules() if isinstance(module, ChannelScale)]
    factors = scale.factor.tolist()
    parts = factors.count(min(factors))
    assert parts > 16
    assert factors[CHANNEL : CHANNEL + parts] == pytest.approx([1 / parts] * parts)
    assert min(factors[:CHANNEL] + factors[CHANNEL + parts :]) >= 0.5
    assert sum(factors) == pytest.approx(48)  # the parts of each channel make it up


def test_the_rounding_error_falls():
    whole, parts = with_outlier("class token"), with_outlier("class token")
    split(parts)
    weight = "blocks.0.mlp.fc2.weight"
    assert error_of_rounded_input(parts, weight) < error_of_rounded_input(whole, weight) / 3


def test_what_gains_little_is_left_alone():
    graph_module = traced("class token")
    code, before = graph_module.code, logits(graph_module)
    assert split(graph_module) == []
    assert graph_module.code == code
    assert torch.equal(logits(graph_module), before)


@pytest.mark.parametrize("name", VITS)
def test_restored_from_a_record_and_a_state_dict(name):
    first, second = with_outlier(name), traced(name, seed=1)
    record = json.loads(json.dumps(split(first)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        traced(name, seed=1).load_state_dict(first.state_dict())
    restore_(second, record)
    assert [node.name for node in second.graph.nodes] == [node.name for node in first.graph.nodes]
    assert not torch.equal(logits(second), logits(first))
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(second), logits(first))


def test_without_a_record_nothing_is_restored():
    graph_module = traced("class token")
    before = logits(graph_module)
    restore_(graph_module, [])
    assert torch.equal(logits(graph_module), before)
    assert not [module for module in graph_module.modules() if isinstance(module, ChannelScale)]


def test_a_model_without_an_mlp_is_left_alone():
    graph_module = traced("convolutions")
    code, said = graph_module.code, list[str]()
    assert split_(graph_module, Noise(), 0, lambda what, done, total: said.append(what)) == []
    assert (graph_module.code, said) == (code, [])


@pytest.mark.parametrize("read_by", ["residual", "both"])
def test_a_hidden_tensor_that_is_read_twice_is_left_alone(read_by):
    graph_module = with_outlier("class token")
    fc2 = node_of(graph_module, "blocks.0.mlp.fc2.weight")
    hidden = fc2.args[0] if read_by == "both" else fc2.args[0].args[0]  # type: ignore[union-attr]
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    with graph_module.graph.inserting_before(output):
        extra = graph_module.graph.call_method("sum", (hidden,))
        total = graph_module.graph.call_function(torch.add, (output.args[0][0], extra))
    output.args = ((total,),)
    graph_module.recompile()
    before: Tensor = logits(graph_module)
    assert split(graph_module) == []
    assert torch.equal(logits(graph_module), before)
