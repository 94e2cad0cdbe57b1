"""NoisyQuant (arXiv 2211.16056) on tiny models: the noise in plain Python, where it helps, and its bias."""

from dataclasses import dataclass

import pytest
import torch
from tiny import SIZE, Smooth, vit, wrap
from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, silent
from martlet.functional.quantize.logarithmic import fold_shift
from martlet.functional.quantize.noise import search_amplitude
from martlet.graph.observe import observe_calls
from martlet.graph.sites import sites
from martlet.graph.trace import trace
from martlet.nn.quantizers import TableQuantizer
from martlet.techniques.quantize.noisyquant import AMPLITUDES, NoisyQuant, even_noise

SEED = 4


def heavy_tailed() -> Model:
    """A ViT whose LayerNorms give two channels a long tail, and the others values alike, within a step of its grid."""
    torch.manual_seed(0)
    module = vit(depth=2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.full_like(parameter, 0.02 if name.endswith("weight") else 0.2))
                parameter[:2] = 5.0 if name.endswith("weight") else 0.0
    return wrap(module)


def compress(seed: int = SEED, **settings: object) -> Model:
    technique = NoisyQuant(weight_bits=6, activation_bits=6, **settings)  # type: ignore[arg-type]
    return pipeline.run(heavy_tailed(), Recipe((technique,)), Context(images=Smooth(batches=(8,)), seed=seed))


@pytest.fixture(scope="module")
def noisy() -> Model:
    return compress()


@pytest.fixture(scope="module")
def plain() -> Model:
    return compress(noise=False)


def quantizers(model: Model) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Of the input and of the weight of each Linear."""
    assert isinstance(model.module, GraphModule)
    found = {}
    for site in sites(model.module):
        if site.node.target is torch.ops.aten.linear.default:
            names = [str(argument.target) for argument in site.node.args[:2]]  # type: ignore[union-attr]
            found[site.name] = tuple(model.module.get_submodule(name) for name in names)
    return found


def inputs(seed: int) -> dict[str, Tensor]:
    """The rows that each Linear of the float model reads."""
    graph_module, rows = trace(heavy_tailed().module, SIZE), {}
    watch = {
        site.node: lambda value, x, *rest, name=site.name: rows.__setitem__(name, x.flatten(0, -2))
        for site in sites(graph_module)
        if site.node.target is torch.ops.aten.linear.default
    }
    observe_calls(graph_module, Smooth(seed), watch, silent, "")
    return rows


def rounded(x: float, scale: float, zero: float, noise: float, bits: int = 6) -> float:
    """Q(x + N) - N, section 3.2."""
    code = min(max(round((x + noise) / scale) + round(zero), 0), 2**bits - 1)
    return (code - round(zero)) * scale - noise


def zero_and_amplitude(offset: Tensor, unit: Tensor) -> tuple[int, float]:
    """The whole zero point, and the amplitude in steps, of which an offset is made."""
    for i in range(AMPLITUDES + 1):
        rest = offset - unit * i / AMPLITUDES
        if float(rest.max() - rest.min()) < 1e-3:
            return round(float(rest.mean())), i / AMPLITUDES
    raise AssertionError("no amplitude of those that are tried")


@dataclass(frozen=True)
class Example:
    """A layer that got noise: its name, the quantizers of its input and its weight, the zero point, and the noise."""

    name: str
    input: TableQuantizer
    weight: nn.Module
    zero: int
    noise: Tensor


@pytest.fixture(scope="module")
def example(noisy) -> Example:
    found = ((n, q, w) for n, (q, w) in quantizers(noisy).items() if isinstance(q, TableQuantizer) and q.offset.ndim)
    name, quantizer, weight = next(found)
    unit = even_noise(len(quantizer.offset), name, SEED)
    zero, amplitude = zero_and_amplitude(quantizer.offset, unit)
    assert 0 < amplitude <= 1
    return Example(name, quantizer, weight, zero, unit * amplitude * quantizer.scale)


def test_noise_is_one_even_draw_a_channel_within_a_step(plain, example) -> None:
    assert len(example.input.scale.unique()) == 1
    assert 0 <= example.zero < 64
    assert float(example.noise.abs().max()) <= float(example.input.scale[0])
    assert all(q.offset.ndim == 0 for q, _ in quantizers(plain).values())  # type: ignore[union-attr]
    with pytest.raises(AssertionError):
        zero_and_amplitude(example.input.offset, even_noise(len(example.noise), example.name, SEED + 1))


def test_the_quantizer_adds_noise_rounds_and_takes_it_away(example) -> None:
    x = torch.randn(5, len(example.noise), generator=torch.Generator().manual_seed(1))
    found = example.input(x)

    def oracle(noise: Tensor) -> Tensor:
        scale = float(example.input.scale[0])
        rows = [
            [rounded(v, scale, example.zero, n) for v, n in zip(r, noise.tolist(), strict=True)] for r in x.tolist()
        ]
        return torch.tensor(rows)

    assert torch.allclose(found, oracle(example.noise), atol=1e-4)
    assert not torch.allclose(found, oracle(example.noise.flip(0)), atol=1e-2)
    assert not torch.allclose(found, oracle(torch.zeros_like(example.noise)), atol=1e-2)


def test_it_is_the_papers_bias(example) -> None:
    """W Q(x + N) + (b - W N), with the weight as it runs."""
    x, weight = inputs(5)[example.name][:50], example.weight()
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(2))
    codes = torch.clamp(torch.round((x + example.noise) / example.input.scale) + example.zero, 0, 63)
    folded = (codes - example.zero) * example.input.scale @ weight.T + fold_shift(weight, bias, example.noise)
    found = example.input(x) @ weight.T + bias
    assert torch.allclose(found, folded, atol=1e-3)
    assert not torch.allclose(found, folded - bias + fold_shift(weight, bias, -example.noise), atol=1e-2)


def test_layers_err_less_on_other_images_where_the_expectation_says_so(noisy, plain) -> None:
    """Where noise is expected to take a tenth of an input's rounding error away, the layer's output errs less too."""
    with_noise, without = quantizers(noisy), quantizers(plain)
    better = []
    for name, x in inputs(9).items():
        (grid, weight), exact = without[name], x @ without[name][1]().T
        if search_amplitude(x[::4], float(grid.scale), 20)[1] < 0.9:  # type: ignore[arg-type]
            ours, theirs = ((q(x) @ weight().T - exact).square().mean() for q in (with_noise[name][0], grid))
            better.append(bool(ours < theirs))
    assert len(better) >= 3
    assert sum(better) > len(better) / 2


def test_it_is_seeded(noisy) -> None:
    again = compress()
    states = [m.module.state_dict() for m in (noisy, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    other = compress(seed=SEED + 1)
    key = next(k for k in states[0] if k.endswith("offset") and states[0][k].ndim)
    assert not torch.equal(other.module.state_dict()[key], states[0][key])
