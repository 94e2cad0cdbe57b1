"""Bits by layer: what relevance asks for, and which budget is kept."""

import re

import pytest
import torch
from tiny import SIZE, compress, error, images, logits, model
from torch.fx import GraphModule

from martlet.core import registry
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import silent
from martlet.graph.relevance import layer_relevance
from martlet.graph.sites import sites
from martlet.graph.trace import example_values
from martlet.measure.macs import macs_by_node

NAME = "no class token, odd depth"


def used(original: Model, chosen: dict[str, tuple[int, int]]) -> tuple[float, float]:
    """Bits of all weights, and MACs times the bits of both operands, each over what 4 bits everywhere take."""
    graph = original.module
    assert isinstance(graph, GraphModule)
    shapes = example_values(graph, SIZE)
    macs = macs_by_node(graph, shapes)
    size, size_4, work, work_4 = 0, 0, 0, 0
    for site in sites(graph):
        if site.name not in chosen:
            continue
        w, a = chosen[site.name]
        if site.weight is not None:
            count = shapes[site.node.args[site.weight]].numel()  # type: ignore[index]
            size, size_4 = size + count * w, size_4 + count * 4
        else:
            w = a
        work, work_4 = work + macs[site.node].macs * w * a, work_4 + macs[site.node].macs * 16
    return size / size_4, work / work_4


@pytest.mark.parametrize("budget", ["size", "bitops"])
def test_only_what_is_asked_for_is_kept_within(budget: str) -> None:
    done = compress(model(NAME), "uniform", allocation="milp", budget=budget)
    chosen = done.steps[0].record["bits"]
    size, work = used(model(NAME), chosen)
    if budget == "size":
        assert {a for _, a in chosen.values()} == {4}
        assert 0.9 < size <= 1 + 1e-9
    else:
        assert 0.9 < work <= 1 + 1e-9
        assert size > 1
    assert len({tuple(pair) for pair in chosen.values()}) > 1


def test_relevance_takes_bits_from_what_hardly_any_of_the_logit_goes_through() -> None:
    original, x = model(NAME), images(8)
    graph = original.module
    assert isinstance(graph, GraphModule)
    before = compress(original, "uniform", allocation="relevance")
    chosen = before.steps[0].record["bits"]
    assert max(used(original, chosen)) <= 1 + 1e-9
    exact = logits(graph, x)
    equal = error(exact, logits(compress(original, "uniform").module, x))
    assert error(exact, logits(before.module, x)) < equal
    found = list(sites(graph))
    share = layer_relevance(graph, found, x, silent)
    with torch.no_grad():
        for part in ("weight", "bias"):
            graph.get_parameter(f"blocks.1.attn.proj.{part}").mul_(0.01)
    [qkv] = [site.node for site in found if site.name == "blocks.1.attn.qkv"]
    assert layer_relevance(graph, found, x, silent)[qkv] < 0.2 * share[qkv]
    after = compress(original, "uniform", allocation="relevance").steps[0].record["bits"]
    own = [name for name in chosen if name.startswith("blocks.1.attn")]
    assert sum(sum(after[name]) for name in own) < sum(sum(chosen[name]) for name in own)


def test_an_unknown_budget_is_one_clear_error() -> None:
    text = "uniform: budget is 'latency'; it can be average, size, bitops"
    with pytest.raises(RecipeError, match=f"^{re.escape(text)}$"):
        registry.technique("uniform")(**{"budget": "latency"})
