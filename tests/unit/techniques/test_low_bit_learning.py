"""Methods for few bits: what is learned, bits by layer, and branches beside the weights."""

import json
import re

import pytest
import torch
from tiny import SIZE, compress, error, images, logits, model
from torch.fx import GraphModule

from martlet.core import registry
from martlet.core.errors import RecipeError
from martlet.graph.bits import bit_map
from martlet.graph.rewrite.low_rank import split_linears_
from martlet.graph.sites import sites
from martlet.graph.trace import example_values
from martlet.measure.macs import macs_by_node
from martlet.nn.quantizers import PackedWeightQuantizer, WeightQuantizer


@pytest.mark.parametrize("allocation", ["greedy", "milp"])
def test_allocated_bits_differ_and_keep_the_average(allocation: str) -> None:
    original = model("no class token, odd depth")
    done = compress(original, "uniform", allocation=allocation)
    assert isinstance(done.module, GraphModule)
    assert isinstance(original.module, GraphModule)
    [step] = done.steps
    chosen = step.record["bits"]
    assert len({tuple(pair) for pair in chosen.values()}) > 1
    weights = [m for m in done.module.modules() if isinstance(m, (PackedWeightQuantizer, WeightQuantizer))]
    assert sum(m.bits * m.shape.numel() for m in weights) <= 4 * sum(m.shape.numel() for m in weights)
    macs = macs_by_node(original.module, example_values(original.module, SIZE))
    work = {site.name: (macs[site.node].macs, site.is_attention) for site in sites(original.module)}
    used = sum(work[n][0] * a * (a if work[n][1] else w) for n, (w, a) in chosen.items())
    assert used <= 16 * sum(work[n][0] for n in chosen)
    for site in sites(done.module):
        if site.weight is not None and site.name in chosen:
            assert done.module.get_submodule(str(site.node.args[1].target)).bits == chosen[site.name][0]  # type: ignore[union-attr]
    rebuilt = model("no class token, odd depth")
    step.technique.restore_(rebuilt, json.loads(json.dumps(step.record)))
    rebuilt.module.load_state_dict(done.module.state_dict())
    assert torch.equal(logits(rebuilt.module, images()), logits(done.module, images()))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"allocation": "best"}, "allocation is 'best'; it can be equal, greedy, milp, relevance"),
        ({"objective": "mae"}, "objective is 'mae'; it can be mse, perturbation, fisher"),
    ],
)
def test_unknown_settings_are_one_clear_error(settings: dict[str, str], text: str) -> None:
    with pytest.raises(RecipeError, match=f"^uniform: {re.escape(text)}$"):
        registry.technique("uniform")(**settings)


@pytest.mark.parametrize("objective", ["perturbation", "fisher"])
def test_learning_by_an_objective_lowers_the_error_of_the_logits(objective: str) -> None:
    original, x = model("class token"), images(8)
    exact = logits(original.module, x)
    start = compress(original, "uniform", weight_bits=3)
    learned = compress(original, "uniform", weight_bits=3, steps=40, objective=objective)
    assert error(exact, logits(learned.module, x)) < error(exact, logits(start.module, x))


def test_is_vit_learns_weights_under_rounded_activations_first() -> None:
    """The weights that it rounds in the end aren't those that it was given; without learning they are."""
    start = compress(model("class token"), "is_vit")
    [step] = start.steps
    assert "blocks" not in step.record
    learned = compress(model("class token"), "is_vit", steps=3)
    [step] = learned.steps
    assert len(step.record["activations"]) == len(step.record["blocks"]) == 3
    assert isinstance(learned.module, GraphModule)
    moved = 0
    for name, module in learned.module.named_modules():
        if isinstance(module, PackedWeightQuantizer):
            twin = start.module.get_submodule(name)
            moved += int((twin() != module()).sum())
    assert moved > 0


def test_a_branch_of_full_rank_leaves_the_weights_nothing_to_lose() -> None:
    """With it a Linear's output is as in floating point whatever the bits, and what is left of its weight is zero."""
    original, x = model("class token"), images(8)
    done = compress(original, "svdquant", rank=10**6, weight_bits=2)
    for module in done.module.modules():
        if isinstance(module, PackedWeightQuantizer) and len(module.shape) == 2:
            assert float(module().abs().max()) < 1e-5
    half, none = (compress(original, "svdquant", rank=rank, weight_bits=2, activation_bits=8) for rank in (8, 0))
    full = compress(original, "svdquant", rank=10**6, weight_bits=2, activation_bits=8)
    exact = logits(original.module, x)
    errors = [error(exact, logits(m.module, x)) for m in (none, half, full)]
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2]
    assert none.steps[0].record["ranks"] == {}
    assert set(half.steps[0].record["ranks"].values()) == {8, 5}  # the head has five classes
    assert isinstance(half.module, GraphModule)
    assert bit_map(half.module, "f32")["last_layer"] == "input 8, weight 2"  # the head, and not its branch


def test_a_branch_leaves_the_logits_as_they_were() -> None:
    original, x = model("registers and qk-norm"), images()
    exact = logits(original.module, x)
    assert isinstance(original.module, GraphModule)
    ranks = split_linears_(original.module, 7)
    assert set(ranks.values()) == {7, 5}
    torch.testing.assert_close(logits(original.module, x), exact, rtol=1e-4, atol=1e-4)
    branch = next(iter(ranks))
    original.module.get_submodule(f"low_rank.{branch}").up.zero_()
    assert error(exact, logits(original.module, x)) > 1e-2  # the comparison can fail


def test_every_block_learns_under_activations_of_eight_bits() -> None:
    torch.manual_seed(0)
    wide = compress(model("class token"), "uniform", weight_bits=3, activation_bits=8, steps=8)
    plain = compress(model("class token"), "uniform", weight_bits=3, activation_bits=8)
    weights = {n: m for n, m in plain.module.named_modules() if isinstance(m, PackedWeightQuantizer)}
    moved = {n: not torch.equal(m.codes, wide.module.get_submodule(n).codes) for n, m in weights.items()}
    assert sum(moved.values()) > len(moved) / 2
    compress(model("class token"), "adalog", weight_bits=8, activation_bits=8, steps=1)  # few scales, and no weight
