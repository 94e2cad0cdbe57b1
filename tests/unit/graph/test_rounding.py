"""Where roundings go: hoisting changes no value, one quantizer serves all who want it, and a record rebuilds them."""

import copy
import json
from collections.abc import Iterator

import pytest
import torch
from small_vits import VITS, error, logits, node_of, traced
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from martlet.core.errors import ArtifactError
from martlet.graph import rounding
from martlet.graph.rounding import Edge, Grid, clean_, group, hoist, insert_activation_, insert_weight_, restore_
from martlet.graph.sites import PERMUTATIONS, aten, sites
from martlet.nn.quantizers import ActivationQuantizer, WeightQuantizer

U8, S8 = Grid("u8", False), Grid("s8", True)


def quantizer(grid: Grid) -> ActivationQuantizer:
    return ActivationQuantizer(torch.tensor(0.03), torch.tensor(128 if grid == U8 else 0, dtype=grid.dtype))


def all_edges(graph_module: GraphModule) -> dict[Edge, Grid]:
    """Every activation that is multiplied, with another grid in attention."""
    return {
        (site.node.args[position], site.node): S8 if site.is_attention else U8  # type: ignore[misc]
        for site in sites(graph_module)
        for position in site.activations
    }


def rounded(graph_module: GraphModule, edges: dict[Edge, Grid]) -> GraphModule:
    """A copy of the graph with a quantizer for each group of edges."""
    twin = copy.deepcopy(graph_module)
    of = dict(zip(graph_module.graph.nodes, twin.graph.nodes, strict=True))
    for r in group({(of[producer], of[consumer]): grid for (producer, consumer), grid in edges.items()}):
        insert_activation_(twin, r, quantizer(r.grid))
    clean_(twin)
    return twin


def quantizers(graph_module: GraphModule) -> Iterator[Node]:
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            yield node


@pytest.mark.parametrize("name", [*VITS, "convolutions"])
def test_hoisting_changes_no_value(name):
    graph_module = traced(name)
    edges = all_edges(graph_module)
    hoisted = hoist(edges)
    plain = logits(rounded(graph_module, edges))
    assert torch.equal(logits(rounded(graph_module, hoisted)), plain)
    assert error(logits(graph_module), plain) > 1e-3
    assert len(edges) >= len(group(hoisted)) >= 1


@pytest.mark.parametrize("name", VITS)
def test_roundings_stand_above_what_only_moves_values(name):
    edges = all_edges(traced(name))
    hoisted = hoist(edges)
    assert any(producer.target in PERMUTATIONS for producer, _ in edges)
    for (producer, consumer), grid in hoisted.items():
        movable = producer.target in PERMUTATIONS and {hoisted.get((producer, user)) for user in producer.users} == {
            grid
        }
        assert not movable, f"{producer} to {consumer}"
    assert set(hoisted.values()) == set(edges.values())


def test_hoisting_past_what_computes_shows(monkeypatch):
    graph_module = traced("class token")
    edges = all_edges(graph_module)
    plain = logits(rounded(graph_module, edges))
    monkeypatch.setattr(rounding, "PERMUTATIONS", (*PERMUTATIONS, aten.gelu.default))
    assert not torch.equal(logits(rounded(graph_module, hoist(edges))), plain)


class Branches(nn.Module):
    """One reshaped tensor that two Linears and, perhaps, the sum at the end read."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.embed, self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 3), nn.Linear(4, 3)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        parts = self.embed(x).reshape(-1, 2, 4).transpose(1, 2).transpose(1, 2)
        out = self.left(parts) + self.right(parts)
        return out + parts.sum() if self.shared else out


def branches(shared: bool = False) -> tuple[GraphModule, list[Node], Node]:
    """The graph, the two Linears and what they read."""
    graph_module = torch.export.export(Branches(shared).eval(), (torch.zeros(5, 6),)).module(check_guards=False)
    assert isinstance(graph_module, GraphModule)
    left, right = (node_of(graph_module, f"{name}.weight") for name in ("left", "right"))
    operand = left.args[0]
    assert isinstance(operand, Node)
    return graph_module, [left, right], operand


def test_a_rounding_that_all_want_goes_all_the_way_up():
    graph_module, linears, operand = branches()
    embed = node_of(graph_module, "embed.weight")
    [((producer, consumer), grid)] = hoist({(operand, linear): U8 for linear in linears}).items()
    assert (producer, consumer.target, grid) == (embed, aten.reshape.default, U8)


@pytest.mark.parametrize("why", ["another grid", "not rounded", "read elsewhere"])
def test_a_rounding_that_not_all_want_stays(why):
    _, (left, right), operand = branches(shared=why == "read elsewhere")
    edges = {(operand, left): U8, (operand, right): S8 if why == "another grid" else U8}
    if why == "not rounded":
        del edges[operand, right]
    assert hoist(edges) == edges


def test_consumers_that_want_the_same_grid_share_a_quantizer():
    _, (left, right), operand = branches()
    [shared] = group({(operand, left): U8, (operand, right): U8})
    assert (shared.producer, shared.consumers, shared.grid) == (operand, (left, right), U8)
    assert shared.name == f"rounding.{operand.name}_u8"
    two = group({(operand, left): U8, (operand, right): S8})
    assert [(r.consumers, r.name) for r in two] == [
        ((left,), f"rounding.{operand.name}_u8"),
        ((right,), f"rounding.{operand.name}_s8_symmetric"),
    ]


def test_only_the_consumers_named_read_rounded_values():
    graph_module, (left, right), operand = branches()
    x = torch.randn(5, 6)
    exact = graph_module(x)
    [r] = group({(operand, left): U8})
    insert_activation_(graph_module, r, quantizer(U8))
    graph_module.recompile()
    [inserted] = quantizers(graph_module)
    assert (left.args[0], right.args[0], inserted.args) == (inserted, operand, (operand,))
    embed = graph_module.get_submodule("embed")
    parts = nn.functional.linear(x, embed.weight, embed.bias).reshape(-1, 2, 4)  # type: ignore[arg-type]
    change = (quantizer(U8)(parts) - parts) @ graph_module.get_parameter("left.weight").T
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(graph_module(x) - exact, change, atol=1e-6, rtol=1e-4)


def test_a_weight_gives_way_to_its_codes():
    graph_module, (left, right), _ = branches()
    weight = graph_module.get_parameter("left.weight").detach().clone()
    codes = WeightQuantizer.round(weight, weight.abs().amax(1) / 127)
    insert_weight_(graph_module, left, 1, codes)
    assert "left.weight" in dict(graph_module.named_parameters())
    clean_(graph_module)
    assert "left.weight" not in dict(graph_module.named_parameters())
    assert "right.weight" in dict(graph_module.named_parameters())
    assert torch.equal(graph_module.get_buffer("left.weight_quantizer.values"), codes.values)
    assert right.args[1].target == "right.weight"  # type: ignore[union-attr]
    twin, *_ = branches()
    twin.load_state_dict({**graph_module.state_dict(), "left.weight": codes()}, strict=False)
    x = torch.randn(5, 6)
    assert torch.equal(graph_module(x), twin(x))


def quantize_all(graph_module: GraphModule) -> dict[str, object]:
    """A quantizer on every activation that is multiplied and on every weight. Returns the record."""
    found = list(sites(graph_module))
    roundings = group(hoist(all_edges(graph_module)))
    weights = []
    for site in found:
        if site.weight is not None:
            weight = rounding.tensor(graph_module, site.node.args[site.weight]).detach()
            scale = weight.flatten(1).abs().amax(1) / 127
            weights.append((site.node, site.weight, WeightQuantizer.round(weight, scale, 0)))
    return rounding.insert_(graph_module, {r: quantizer(r.grid) for r in roundings}, weights)


@pytest.mark.parametrize("name", [*VITS, "convolutions"])
def test_restored_from_a_record_and_a_state_dict(name):
    first, second = traced(name), traced(name, seed=1)
    exact, record = logits(first), json.loads(json.dumps(quantize_all(first)))
    restore_(second, record)
    assert [node.name for node in second.graph.nodes] == [node.name for node in first.graph.nodes]
    shapes = {key: (value.shape, value.dtype) for key, value in first.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in second.state_dict().items()} == shapes
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(second), logits(first))
    assert error(exact, logits(first)) > 1e-3


@pytest.mark.parametrize("part", ["producer", "consumer", "weight"])
def test_a_node_that_is_not_there_is_an_error_with_its_name(part):
    record = json.loads(json.dumps(quantize_all(traced("class token"))))
    if part == "weight":
        record["weights"][0][0] = "linear_99"
    elif part == "producer":
        record["activations"][0][0] = "linear_99"
    else:
        record["activations"][0][1][0] = "linear_99"
    with pytest.raises(ArtifactError, match="no node 'linear_99'; it was recorded with other library versions"):
        restore_(traced("class token"), record)
