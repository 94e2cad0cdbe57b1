"""Exits together with what else shrinks a model: what goes together does, and what doesn't is refused by name."""

import pytest
import torch

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.preprocess import Preprocess
from martlet.graph.stages import cumulative_macs, run, stages
from martlet.source import load_model
from martlet.vit.exits import readout, shapes
from martlet.vit.view import view

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}
LEARN = "{epochs: 1, batch: 16}"


class Noise:
    """Calibration images."""

    num_images = 32

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(16, 3, 16, 16, generator=generator)


def apply(text: str, model=None):
    model = model or load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)
    recipe = Recipe.from_yaml(f"martlet: 1\npasses: [{text}]")
    return pipeline.run(model, recipe, Context(images=Noise(), seed=1))


@pytest.fixture(scope="module")
def whole() -> list[int]:
    """MACs up to each exit, of a model to which nothing else was done."""
    return macs(apply(f"linear_exits: {LEARN}"))


def macs(model) -> list[int]:
    return cumulative_macs(stages(pipeline.traced(model).module), (16, 16))


@pytest.mark.parametrize("first", ["tome: {r: 2}", pytest.param("mctf", marks=pytest.mark.slow),
                                   pytest.param("tps", marks=pytest.mark.slow)])  # fmt: skip
def test_exits_read_the_tokens_that_are_left(first, whole):
    fewer, both = apply(first), apply(f"{first}, linear_exits: {LEARN}")
    images, graph = torch.randn(3, 3, 16, 16), pipeline.traced(both).module
    with torch.inference_mode():
        assert torch.equal(both.module(images), fewer.module(images))  # no image leaves yet
        given = run(stages(graph), images)
        assert torch.allclose(next(iter(given[-1].values())), fewer.module(images), atol=1e-5)
    found = cumulative_macs(stages(graph), (16, 16))
    assert all(a < b for a, b in zip(found[1:], whole[1:], strict=True))
    assert found[-1] - found[-2] < 0.8 * (whole[-1] - whole[-2])


@pytest.mark.parametrize(
    "name", ["linear_exits", pytest.param("lgvit", marks=pytest.mark.slow),
             pytest.param("dyn_perceiver", marks=pytest.mark.slow)]
)  # fmt: skip
def test_exits_on_a_pruned_model(name, whole):
    pruned, both = apply("ziplm"), apply(f"ziplm, {name}: {LEARN}")
    images = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(both.module(images), pruned.module(images)) == (name != "dyn_perceiver")
    if name == "linear_exits":
        assert all(a < b for a, b in zip(macs(both), whole, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tome, lgvit", r"passes\[1\] lgvit requires 'all_tokens', which passes\[0\] tome breaks; leave one"),
        ("tome, dyn_perceiver", r"passes\[1\] dyn_perceiver requires 'all_tokens', which passes\[0\] tome breaks"),
        ("lgvit, tome", r"passes\[1\] tome requires 'one_exit', which passes\[0\] lgvit breaks; leave one of"),
        ("linear_exits, ziplm", r"passes\[1\] ziplm requires 'one_exit', .*linear_exits breaks; move ziplm before it"),
        ("mue, path_ensemble", r"passes\[1\] path_ensemble requires 'one_exit', which passes\[0\] mue breaks; move"),
        ("dyn_perceiver, dependency", r"passes\[1\] dependency requires 'one_exit', which passes\[0\] dyn_perceiver"),
        ("tome: {r: 2}, mue", "^mue: after 1 blocks the tokens of timm:.* have another shape .*linear_exits has heads"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(text, message):
    with pytest.raises(RecipeError, match=message):
        apply(text)


def test_similar_tokens_are_asked_within_a_stage_of_the_last_width():
    kwargs = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    swin = load_model("timm:swin_tiny_patch4_window7_224", model_kwargs=kwargs, num_classes=10, seed=3)
    with pytest.raises(RecipeError, match=r"^mue: after 1 blocks .*; after can be of \[3\]$"):
        apply("mue", swin)
    images, done = torch.randn(2, 3, 16, 16), apply("mue: {after: [3]}", swin)
    with torch.inference_mode():
        assert torch.equal(done.module(images), swin.module(images))


def test_heads_know_the_grid_of_their_stage():
    """Of a Swin whose tokens stand in a row, as Hugging Face's do."""
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(image_size=16, patch_size=2, window_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4])
    preprocess = Preprocess(size=(16, 16), resize=16)
    host = SwinForImageClassification(config).eval()
    model = Model(name="hf", module=host, preprocess=preprocess, num_classes=10, origin={})
    vit = view(host)
    for n, shape in enumerate(shapes(model, vit, range(4))):
        grid = readout(vit, n).grid
        assert grid is not None
        assert grid[0] * grid[1] == shape[1]
    assert [readout(vit, n).grid for n in range(4)] == [(8, 8), (8, 8), (4, 4), (4, 4)]
