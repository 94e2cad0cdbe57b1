"""The bit map, by hand: every kind of operand is counted with the bits that it is really kept in."""

import torch
from small_vits import traced
from torch.fx import GraphModule

from martlet.graph.bits import bit_map
from martlet.graph.rounding import Grid, Rounding, clean_, insert_activation_, insert_weight_, tensor
from martlet.graph.sites import Site, sites
from martlet.nn.quantizers import ActivationQuantizer, WeightQuantizer

DEPTH = 3  # of "no class token"


def sites_of(graph_module: GraphModule) -> dict[str, Site]:
    return {site.name: site for site in sites(graph_module)}


def round_operand(graph_module: GraphModule, site: Site, position: int) -> None:
    r = Rounding(site.node.args[position], (site.node,), Grid("u8", False))  # type: ignore[arg-type]
    insert_activation_(graph_module, r, ActivationQuantizer(torch.ones(()), torch.zeros((), dtype=torch.uint8)))


def round_weight(graph_module: GraphModule, site: Site) -> None:
    weight = tensor(graph_module, site.node.args[1]).detach()
    insert_weight_(graph_module, site.node, 1, WeightQuantizer.round(weight, weight.flatten(1).abs().amax(1)))


def test_without_quantizers_all_is_what_the_engine_computes_in():
    expected = ("linear_input", "linear_weight", "conv_input", "conv_weight", "q", "k", "v", "attention_probabilities")
    expected += ("layer_norm_output", "gelu_output", "softmax_output", "residual")
    found = bit_map(traced("no class token"), "bf16")
    assert found.pop("first_layer") == found.pop("last_layer") == "input bf16, weight bf16"
    assert found == dict.fromkeys(expected, "bf16")


def test_every_kind_is_counted_by_itself():
    graph_module = traced("no class token")
    of = sites_of(graph_module)
    round_operand(graph_module, of["blocks.0.attn.scores"], 0)  # q
    round_operand(graph_module, of["blocks.1.attn.scores"], 0)
    for block in range(DEPTH):
        round_operand(graph_module, of[f"blocks.{block}.attn.scores"], 1)  # k
    round_operand(graph_module, of["blocks.0.attn.values"], 1)  # v
    round_operand(graph_module, of["blocks.2.mlp.fc2"], 0)
    round_weight(graph_module, of["blocks.2.mlp.fc2"])
    round_weight(graph_module, of["patch_embed.proj"])
    clean_(graph_module)
    linears = 4 * DEPTH + 1
    assert bit_map(graph_module, "f32") == {
        "conv_input": "f32",
        "conv_weight": "8",
        "linear_input": f"f32 ({linears - 1}), 8 (1)",
        "linear_weight": f"f32 ({linears - 1}), 8 (1)",
        "q": "8 (2), f32 (1)",
        "k": "8",
        "attention_probabilities": "f32",
        "v": "f32 (2), 8 (1)",
        "first_layer": "input f32, weight 8",
        "last_layer": "input f32, weight f32",
        "layer_norm_output": "f32",
        "gelu_output": "f32 (2), 8 (1)",
        "softmax_output": "f32",
        "residual": "f32",
    }


def test_a_rounding_is_found_behind_what_only_moves_values():
    graph_module = traced("class token")
    values = sites_of(graph_module)["blocks.0.attn.values"].node
    node = values.args[1]  # v: a part of the output of qkv
    while node.op == "call_function" and "linear" not in str(node.target):  # type: ignore[union-attr]
        node = node.args[0]  # type: ignore[union-attr]
    r = Rounding(node, tuple(node.users), Grid("u8", False))  # type: ignore[arg-type, union-attr]
    insert_activation_(graph_module, r, ActivationQuantizer(torch.ones(()), torch.zeros((), dtype=torch.uint8)))
    assert bit_map(graph_module, "f32")["v"] == "8"


def test_a_model_of_convolutions_has_no_attention_to_speak_of():
    found = bit_map(traced("convolutions"), "f16")
    assert set(found) == {"conv_input", "conv_weight", "linear_input", "linear_weight"} | {
        "first_layer",
        "last_layer",
        "residual",
    }
    assert set(found.values()) == {"f16", "input f16, weight f16"}
