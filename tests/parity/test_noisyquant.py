"""NoisyQuant (arXiv 2211.16056) on tiny models: the noise in plain Python, where it helps, and its bias."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, silent
from martlet.data.preprocess import Preprocess
from martlet.functional.logarithmic import fold_shift
from martlet.functional.noise import noisy_bias
from martlet.graph.observe import observe_calls
from martlet.graph.sites import sites
from martlet.graph.trace import trace
from martlet.nn.quantizers import TableQuantizer
from martlet.techniques.quantize.noisyquant import AMPLITUDES, NoisyQuant


class Smooth:
    num_images = 16

    def __init__(self, seed: int = 5) -> None:
        self.seed = seed

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        yield nn.functional.interpolate(torch.randn(16, 3, 6, 6, generator=generator), (32, 32), mode="bilinear")


def heavy_tailed() -> Model:
    """A ViT whose LayerNorms give a few channels ten times the others' range, as trained ones do."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=96, depth=3, num_heads=3, num_classes=5).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[:2] *= 15.0
    preprocess = Preprocess(size=(32, 32), resize=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Model(module=vit, num_classes=5, name="tiny", origin={"source": "test"}, preprocess=preprocess)


def compress(**settings: object) -> Model:
    technique = NoisyQuant(weight_bits=6, activation_bits=6, **settings)  # type: ignore[arg-type]
    return pipeline.run(heavy_tailed(), Recipe((technique,)), Context(images=Smooth(), seed=4))


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
    graph_module, rows = trace(heavy_tailed().module, (32, 32)), {}
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


NOISY = "blocks.1.attn.qkv"


def drawn() -> Tensor:
    """The even draw for NOISY: the fifth, after those of the first block's Linears."""
    generator = torch.Generator().manual_seed(4)
    return [noisy_bias(channels, 1.0, generator) for channels in (96, 96, 96, 384, 96)][-1]


def zero_and_amplitude(offset: Tensor, unit: Tensor) -> tuple[int, float]:
    """The whole zero point, and the amplitude in steps, of which an offset is made."""
    for i in range(AMPLITUDES + 1):
        rest = offset - unit * i / AMPLITUDES
        if float(rest.max() - rest.min()) < 1e-3:
            return round(float(rest.mean())), i / AMPLITUDES
    raise AssertionError("no amplitude of those that are tried")


@pytest.fixture(scope="module")
def example(noisy) -> tuple[TableQuantizer, nn.Module, int, Tensor]:
    """Of NOISY: the quantizers of its input and its weight, the zero point, and the noise."""
    quantizer, weight = quantizers(noisy)[NOISY]
    assert isinstance(quantizer, TableQuantizer)
    zero, amplitude = zero_and_amplitude(quantizer.offset, drawn())
    assert 0 < amplitude <= 1
    return quantizer, weight, zero, drawn() * amplitude * quantizer.scale


def test_noise_is_one_even_draw_a_channel_within_a_step(noisy, plain, example) -> None:
    quantizer, _, zero, _ = example
    assert quantizer.offset.shape == (96,)
    assert len(quantizer.scale.unique()) == 1
    assert 0 <= zero < 64
    assert all(q.offset.ndim == 0 for q, _ in quantizers(plain).values())  # type: ignore[union-attr]
    with pytest.raises(AssertionError):
        zero_and_amplitude(quantizer.offset, drawn().flip(0))


def test_the_quantizer_adds_noise_rounds_and_takes_it_away(example) -> None:
    quantizer, _, zero, noise = example
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))

    def oracle(noise: list[float]) -> Tensor:
        scale = float(quantizer.scale[0])
        rows = [[rounded(v, scale, zero, n) for v, n in zip(row, noise, strict=True)] for row in x.tolist()]
        return torch.tensor(rows)

    assert torch.allclose(quantizer(x), oracle(noise.tolist()), atol=1e-4)
    assert not torch.allclose(quantizer(x), oracle(noise.flip(0).tolist()), atol=1e-2)
    assert not torch.allclose(quantizer(x), oracle([0.0] * 96), atol=1e-2)


def test_it_is_the_papers_bias(example) -> None:
    """W Q(x + N) + (b - W N), with the weight as it runs."""
    quantizer, weight, zero, noise = example
    x, bias = inputs(5)[NOISY][:50], torch.randn(288, generator=torch.Generator().manual_seed(2))
    codes = torch.clamp(torch.round((x + noise) / quantizer.scale) + zero, 0, 63)
    folded = (codes - zero) * quantizer.scale @ weight().T + fold_shift(weight(), bias, noise)
    assert torch.allclose(quantizer(x) @ weight().T + bias, folded, atol=1e-3)


def test_it_is_seeded(noisy) -> None:
    again = compress()
    states = [m.module.state_dict() for m in (noisy, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    other = pipeline.run(
        heavy_tailed(), Recipe((NoisyQuant(weight_bits=6, activation_bits=6),)), Context(images=Smooth(), seed=5)
    )
    key = next(k for k in states[0] if k.endswith("offset") and states[0][k].ndim)
    assert not torch.equal(other.module.state_dict()[key], states[0][key])
