"""int8 with layers that stay in floating point: what is rounded, what stays exact, and what a rebuilt model needs."""

import copy
import functools
import itertools

import pytest
import tiny
import torch
from torch import nn
from torch.fx import GraphModule

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Int8Form, Stage
from martlet.graph.bits import bit_map
from martlet.graph.sensitivity import changed_logits
from martlet.graph.sites import Site, sites, source
from martlet.nn.quantizers import ActivationQuantizer
from martlet.techniques.quantize.int8 import Int8

CHOICES = {
    "class token": ("blocks.0.attn.qkv", "blocks.0.mlp.fc2"),
    "no class token, odd depth": ("blocks.0.attn.proj", "blocks.1.attn.scores", "blocks.1.attn.values", "head"),
    "registers and qk-norm": ("blocks.0.attn.values", "patch_embed.proj"),
    "no biases": ("blocks.0.attn.scores", "blocks.0.mlp"),
    "swin": ("layers.0.blocks.1.attn", "layers.1.downsample"),
}
HOISTED, IN_PLACE = Int8Form(add=True), Int8Form(hoist=False)


@functools.cache
def compress(name: str, form: Int8Form | None = None, **settings: object) -> Model:
    context = Context(images=tiny.Smooth(), seed=1, int8=form or Int8Form())
    return pipeline.run(tiny.model(name), Recipe((Int8(**settings),)), context)  # type: ignore[arg-type]


def rounded(graph_module: GraphModule, site: Site) -> list[bool]:
    """Of both operands of a multiplication."""
    found = []
    for operand in site.node.args[:2]:
        node = source(operand)  # type: ignore[arg-type]
        found.append(node.op == "call_module" and hasattr(graph_module.get_submodule(str(node.target)), "bits"))
    return found


def belongs(name: str, paths: tuple[str, ...]) -> bool:
    return any(name == path or name.startswith(path + ".") for path in paths)


@pytest.mark.parametrize(("name", "form"), [*((name, HOISTED) for name in CHOICES), ("class token", IN_PLACE)])
def test_what_is_named_stays_and_all_else_is_rounded(name: str, form: Int8Form) -> None:
    left = CHOICES[name]
    model = compress(name, form, float_layers=left)
    found = list(sites(model.module))  # type: ignore[arg-type]
    stays = [site.name for site in found if belongs(site.name, left)]
    assert len(stays) >= len(left)
    for site in found:
        assert rounded(model.module, site) == [site.name not in stays] * 2, site.name  # type: ignore[arg-type]
    assert model.steps[-1].record["in_floating_point"] == stays
    reference, x = tiny.model(name).module, tiny.images(8)
    exact = tiny.logits(reference, x)
    assert 0 < tiny.error(exact, tiny.logits(model.module, x)) < 0.25


@pytest.mark.parametrize("name", CHOICES)
def test_a_rebuilt_model_takes_the_state_dict(name: str) -> None:
    model = compress(name, HOISTED, float_layers=CHOICES[name])
    rebuilt = tiny.model(name)
    pipeline.restore_(rebuilt, copy.deepcopy(model.steps))
    rebuilt.module.load_state_dict(model.module.state_dict())
    x = tiny.images()
    assert torch.equal(tiny.logits(rebuilt.module, x), tiny.logits(model.module, x))


@pytest.mark.parametrize("left", [(), ("blocks.0.attn.proj",), ("blocks.0.attn.qkv", "blocks.0.mlp.fc1")])
def test_nothing_is_rounded_by_a_plan(left: tuple[str, ...]) -> None:
    """Centred, smoothed, split, q, k and v on one grid: each is undone, also where a reader stays in floating point."""
    model, x = tiny.model("class token"), tiny.images(8)
    before = tiny.logits(model.module, x)
    plan = Int8(float_layers=left).plan_(model.module, Context(images=tiny.Smooth()))  # type: ignore[arg-type]
    torch.testing.assert_close(tiny.logits(model.module, x), before, rtol=1e-4, atol=1e-4)
    assert plan.record["centred"] == 3
    assert plan.record["smoothed"] == len({"blocks.0.attn.qkv", "blocks.0.mlp.fc1"} - set(left))
    assert "linear" in [r.producer.name for r in plan.activations]  # q, k and v, on the output of theirs


def test_the_bit_map_says_what_stays() -> None:
    everything = bit_map(compress("no class token, odd depth").module, "bf16")  # type: ignore[arg-type]
    assert {everything[kind] for kind in ("linear_weight", "linear_input", "q", "k", "v")} == {"8"}
    model = compress("no class token, odd depth", HOISTED, float_layers=CHOICES["no class token, odd depth"])
    found = bit_map(model.module, "bf16")  # type: ignore[arg-type]
    assert found["linear_weight"] == found["linear_input"] == "8 (11), bf16 (2)"
    assert found["q"] == found["k"] == found["v"] == found["attention_probabilities"] == "8 (2), bf16 (1)"
    assert found["softmax_output"] == "8 (2), bf16 (1)"
    assert found["last_layer"] == "input bf16, weight bf16"
    assert found["first_layer"] == "input 8, weight 8"


def test_linears_that_stay_dont_say_how_a_norm_is_smoothed() -> None:
    """One of two Linears behind a LayerNorm: its weights are as if the other weren't there."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(48), nn.Linear(48, 40), nn.Linear(48, 40)
            self.head = nn.Linear(40, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.norm(images.flatten(1).unflatten(1, (64, 48)))
            return self.head(self.a(x).relu() + self.b(x).tanh()).mean(1)

    torch.manual_seed(0)
    module = Two()
    with torch.no_grad():
        module.norm.weight.mul_(torch.rand(48) * 20)
        module.b.weight.mul_(torch.rand(48) * 20)
    context = Context(images=tiny.Smooth())
    norms = {}
    for left in ((), ("b",), ("a", "b")):
        model = pipeline.run(tiny.wrap(copy.deepcopy(module)), Recipe((Int8(shift=False, float_layers=left),)), context)
        norms[left] = model.module.get_parameter("norm.weight").detach() / module.norm.weight.detach()
    spread = {left: float(ratio.std()) for left, ratio in norms.items()}
    assert spread["a", "b"] == 0
    assert spread[()] > 0.01
    assert not torch.allclose(norms[()], norms[("b",)])


def test_one_layer_rounded_alone_is_the_model_in_which_all_others_stay() -> None:
    """By the plan's own account, and by a model that was made so."""
    settings = {"shift": False, "smooth": False, "split": False, "ranges": "minmax"}
    model, x = tiny.model("class token"), tiny.images(8)
    plan = Int8(**settings).plan_(model.module, Context(images=tiny.Smooth(), int8=IN_PLACE))  # type: ignore[arg-type]
    groups = [{site.node: plan.rounded(site)} for site in plan.sites]
    both = {node: call for group in groups[:2] for node, call in group.items()}
    exact, found = changed_logits(model.module, x, [*groups, both])  # type: ignore[arg-type]
    torch.testing.assert_close(exact, tiny.logits(tiny.model("class token").module, x))
    names = [site.name for site in plan.sites]
    assert len(names) == 8
    for i in (1, 3):  # a Linear, a product
        others = tuple(name for name in names if name != names[i])
        alone = compress("class token", IN_PLACE, float_layers=others, **settings)
        torch.testing.assert_close(found[i], tiny.logits(alone.module, x), rtol=1e-4, atol=1e-5)
        assert tiny.error(exact, found[i]) > 1e-4
    pair = compress("class token", IN_PLACE, float_layers=tuple(names[2:]), **settings)
    assert (
        tiny.error(tiny.logits(pair.module, x), found[-1]) < tiny.error(exact, found[-1]) / 3
    )  # one bias is corrected
    differ = [tiny.error(a, b) for a, b in itertools.combinations(found, 2)]
    assert min(differ) > 0


def test_bad_names_are_one_line() -> None:
    with pytest.raises(RecipeError, match=r"names 'blocks.0.mlp.fc3', and tiny has no such layer; did you mean blocks"):
        compress("class token", float_layers=("blocks.0.mlp.fc3",))
    with pytest.raises(RecipeError, match="leaves nothing to quantize; name fewer, or leave int8 out"):
        compress("class token", float_layers=("patch_embed", "blocks", "head"))
    with pytest.raises(RecipeError, match=r"float_layers is 'head'; it can be a list of names"):
        Int8(float_layers="head")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"int8\.float_layers takes a list, not 'head' \(str\)"):
        Recipe.from_yaml("martlet: 1\npasses:\n  - int8: {float_layers: head}")
    with pytest.raises(RecipeError, match=r"float_layers is \[3\]; it can be a list of names"):
        Recipe.from_yaml("martlet: 1\npasses:\n  - int8: {float_layers: [3]}")


def test_a_recipe_keeps_its_names() -> None:
    recipe = Recipe.from_yaml("martlet: 1\npasses:\n  - int8: {float_layers: [head, blocks.3.attn]}")
    assert recipe.passes == (Int8(float_layers=("head", "blocks.3.attn")),)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert hash(recipe) != hash(Recipe((Int8(),)))


def test_pieces_of_a_convolution_go_by_its_name() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 12, 1)
            self.head = nn.Linear(4, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            a, b, c = self.mix(self.stem(images).relu()).split([4, 4, 4], 1)
            return self.head((a * b.sigmoid() + c).mean((2, 3)))

    original = tiny.wrap(Cut())
    pipeline.enter_(original, Stage.GRAPH)
    model = pipeline.run(original, Recipe((Int8(float_layers=("mix",)),)), Context(images=tiny.Smooth()))
    assert model.steps[-1].record["in_floating_point"] == [f"mix.pieces.{i}" for i in range(3)]
    quantizers = [m for m in model.module.modules() if isinstance(m, ActivationQuantizer)]
    assert len(quantizers) == 2
