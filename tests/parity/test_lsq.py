"""lsq's rounding has the paper's gradients, number by number; and a quantized model learns under it and reloads."""

import pytest
import torch
from torch import Tensor

from martlet.core import pipeline, store
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.engine.torch import Torch
from martlet.functional.distillation import divergence
from martlet.functional.quantize.lsq import gradient_scale, round_with_step
from martlet.nn.quantizers import PackedWeightQuantizer
from martlet.nn.straight_through import LearnedWeight
from martlet.source import load_model
from martlet.techniques.qat.lsq import LSQ

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


def by_hand(x: Tensor, s: float, low: int, high: int, inside: bool = True) -> tuple[list[float], list[float], float]:
    """Values, dy/dx of each, and dy/ds of their sum (equations 1 to 5)."""
    values, slopes, by_step = [], [], 0.0
    for v in x.tolist():
        ratio = v / s
        if ratio <= low or ratio >= high:
            code = low if ratio <= low else high
            slopes.append(0.0)
            by_step += code
        else:
            code = round(ratio)
            slopes.append(1.0)
            by_step += code - ratio if inside else 0.0
        values.append(code * s)
    return values, slopes, by_step


def test_gradients_are_the_papers():
    x = torch.linspace(-1.7, 1.3, 40, dtype=torch.float64).requires_grad_()
    s = torch.tensor(0.21, dtype=torch.float64, requires_grad=True)
    low, high = torch.tensor(-4.0), torch.tensor(3.0)
    y = round_with_step(x, s, low.double(), high.double())
    y.sum().backward()
    values, slopes, by_step = by_hand(x.detach(), 0.21, -4, 3)
    assert y.tolist() == pytest.approx(values)
    assert x.grad.tolist() == slopes
    assert float(s.grad) == pytest.approx(by_step)
    assert float(s.grad) != pytest.approx(by_hand(x.detach(), 0.21, -4, 3, inside=False)[2]), (
        "PACT's gradient is another"
    )
    assert gradient_scale(100, 4) == pytest.approx(0.05)


def weight() -> tuple[Tensor, PackedWeightQuantizer]:
    """A weight (6, 16) of 3 bits in two groups with zero points."""
    rows = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    groups = rows.unflatten(1, (2, 8))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / 7
    zero = (-low / scale).round().clamp(0, 7)
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 7).flatten(1)
    return rows, PackedWeightQuantizer(codes.to(torch.uint8), scale, 3, zero)


@pytest.mark.parametrize("known", [True, False])
def test_a_weight_begins_as_it_was_rounded_and_ends_as_it_was_learned(known):
    rows, quantizer = weight()
    before = quantizer().clone()
    layer = LearnedWeight(quantizer, rows if known else rows[:3])
    torch.testing.assert_close(layer(), before)
    if known:
        inside = (rows - before).abs() < 0.49 * quantizer.scale.repeat_interleave(8, 1)
        torch.testing.assert_close(layer.weight[inside], rows[inside])
    layer().square().sum().backward()
    with torch.no_grad():
        layer.weight += 0.3 * torch.randn(6, 16)
        layer.factor *= 1.1
    learned = layer().detach()
    assert not torch.equal(learned, before)
    layer.finish_()
    torch.testing.assert_close(quantizer(), learned)


def test_a_steps_gradient_is_damped():
    _, quantizer = weight()
    layer = LearnedWeight(quantizer)
    torch.manual_seed(0)
    direction = torch.randn(6, 16)
    (layer() * direction).sum().backward()
    scale = quantizer.scale.clone().requires_grad_()
    wide = scale.repeat_interleave(8, 1)
    (round_with_step(layer.weight.detach(), wide, layer.low, layer.high) * direction).sum().backward()
    torch.testing.assert_close(layer.factor.grad, scale.grad * quantizer.scale * (8 * 4) ** -0.5)


def source() -> Model:
    preprocess = {"size": (16, 16), "resize": 16}
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=5, preprocess=preprocess, seed=3)


def images(model: Model) -> Examples:
    pixels = torch.randint(0, 256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Examples(pixels, None, model.preprocess, "noise")


class Batches:
    num_images = 64

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __iter__(self):
        yield self.examples.normalize(self.examples.pixels)


@pytest.mark.parametrize("bits", [(3, 6), pytest.param((2, 8), marks=pytest.mark.slow)])
def test_a_quantized_model_comes_nearer_to_what_it_was_and_reloads(bits, tmp_path):
    model = source()
    examples = images(model)
    recipe = Recipe.from_yaml(
        f"martlet: 1\npasses: [uniform: {{weight_bits: {bits[0]}, activation_bits: {bits[1]}}}, "
        "lsq: {epochs: 20, batch: 32, rate: 2.0e-3, augment: none}]"
    )
    context = Context(images=Batches(examples), training=examples, seed=1)
    rounded = pipeline.run(model, Recipe(recipe.passes[:1]), context)
    done = pipeline.run(model, recipe, context)
    x = examples.normalize(examples.pixels)
    with torch.no_grad():
        wanted = model.module(x)
        errors = [float(divergence(m.module(x), wanted)) for m in (rounded, done)]
    assert errors[1] < 0.5 * errors[0]
    kinds = [{name: type(m).__name__ for name, m in each.module.named_modules()} for each in (rounded, done)]
    assert kinds[0] == kinds[1]
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, done, "torch", store.write_model(folder, done, Torch()))
    with torch.no_grad():
        assert torch.equal(store.load(tmp_path / "out").model().module(x), done.module(x))


def test_where_nothing_is_rounded_it_is_refused():
    model = source()
    with pytest.raises(
        RecipeError, match="lsq: nothing of timm:vit_tiny_patch16_224 is rounded yet; put what quantizes"
    ):
        pipeline.run(model, Recipe((LSQ(),)), Context(training=images(model)))


def test_a_teacher_that_is_rounded_itself_is_refused():
    model = source()
    examples = images(model)
    context = Context(images=Batches(examples), training=examples)
    rounded = pipeline.run(model, Recipe.from_yaml("martlet: 1\npasses: [uniform]"), context)
    with pytest.raises(RecipeError, match="vit_tiny_patch16_224 is rounded itself; give another, as it was before"):
        pipeline.run(rounded, Recipe((LSQ(),)), context)
