"""EfficientQAT: blocks learn weights and steps together; then steps alone move, and codes stay as they are."""

import pytest
import torch

from martlet.core import pipeline, store
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.engine.torch import Torch
from martlet.functional.distillation import divergence
from martlet.nn.quantizers import PackedWeightQuantizer
from martlet.nn.straight_through import LearnedSteps
from martlet.source import load_model
from martlet.techniques.qat.e2e_qp import E2eQp
from martlet.techniques.quantize.uniform import Uniform

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
SETTINGS = {"epochs": 20, "batch": 32, "rate": 3e-3, "augment": "none"}


def source() -> Model:
    preprocess = {"size": (16, 16), "resize": 16}
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=5, preprocess=preprocess, seed=3)


def images() -> Examples:
    pixels = torch.randint(0, 256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Examples(pixels, None, source().preprocess, "noise")


class Batches:
    num_images = 64

    def __iter__(self):
        its = images()
        yield its.normalize(its.pixels)


def run(*passes) -> Model:
    return pipeline.run(source(), Recipe(passes), Context(images=Batches(), training=images(), seed=1))


def error(model: Model) -> float:
    [x] = Batches()
    with torch.no_grad():
        return float(divergence(model.module(x), source().module(x)))


def test_a_weight_by_its_steps_is_the_papers():
    """w = (q - z) s, with dw/ds = q - z, number by number."""
    codes = torch.randint(0, 8, (4, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    scale, zero = torch.rand(4, 2) + 0.1, torch.randint(0, 8, (4, 2)).float()
    layer = LearnedSteps(PackedWeightQuantizer(codes, scale, 3, zero))
    direction = torch.randn(4, 16)
    weight = layer()
    (weight * direction).sum().backward()
    for o in range(4):
        for g in range(2):
            steps = [float(codes[o, i]) - float(zero[o, g]) for i in range(8 * g, 8 * g + 8)]
            assert weight[o, 8 * g : 8 * g + 8].tolist() == pytest.approx([q * float(scale[o, g]) for q in steps])
            slope = sum(q * float(direction[o, 8 * g + i]) for i, q in enumerate(steps)) * float(scale[o, g])
            assert float(layer.factor.grad[o, g]) == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_steps_alone_are_learned_codes_stay_and_it_reloads(tmp_path):
    quantize, train = Uniform(weight_bits=3, activation_bits=8), E2eQp(**SETTINGS)
    before = run(quantize)
    after = run(quantize, train)
    a, b = before.module.state_dict(), after.module.state_dict()
    moved = {name for name in a if not torch.equal(a[name], b[name])}
    weights = {n for n, m in before.module.named_modules() if isinstance(m, PackedWeightQuantizer)}
    assert moved == {f"{name}.scale" for name in weights}
    learned = sum(a[name].numel() for name in moved)
    assert learned < 0.05 * sum(
        m.shape.numel() for m in before.module.modules() if isinstance(m, PackedWeightQuantizer)
    )
    assert error(after) < 0.8 * error(before)
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, after, "torch", store.write_model(folder, after, Torch()))
    [x] = Batches()
    with torch.no_grad():
        assert torch.equal(store.load(tmp_path / "out").model().module(x), after.module(x))


def test_both_phases_beat_rounding_and_each_other():
    """Rounded to nearest, with blocks learned, and with steps trained after that."""
    learn = Uniform(weight_bits=2, activation_bits=8, ranges="mse", steps=20, freedom="all")
    errors = [
        error(model)
        for model in (
            run(Uniform(weight_bits=2, activation_bits=8, ranges="mse")),
            run(learn),
            run(learn, E2eQp(**SETTINGS)),
        )
    ]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.9 * errors[1]


def test_where_nothing_is_rounded_it_is_refused():
    with pytest.raises(RecipeError, match="e2e_qp: nothing of timm:vit_tiny_patch16_224 is rounded yet"):
        run(E2eQp())
