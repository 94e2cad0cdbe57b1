"""DopQ-ViT (arXiv 2408.03291): MOSF in plain Python, what it can and can't change, and where TanQ is."""

import statistics
from collections.abc import Sequence

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, silent
from martlet.data.preprocess import Preprocess
from martlet.functional.quantize.percentile import percentile_scales
from martlet.functional.quantize.reparameterize import ChannelChange, reparameterize_scales
from martlet.graph.trace import trace
from martlet.nn.quantizers import TableQuantizer
from martlet.techniques.quantize.dopq_vit import DopQViT
from martlet.techniques.quantize.repq_vit import RepQViT

CHANNELS, BITS = 8, 4


def rows() -> Tensor:
    """Two of the channels have scales far above the others'."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 90.0, 200.0]).double()
    return torch.randn(400, CHANNELS, generator=generator).double() * spread + torch.arange(CHANNELS)


def oracle(x: Tensor) -> tuple[list[float], list[float]]:
    """r1 = s / s~ and s (z - z~), with s~ the scale of least mean absolute deviation from the channels'."""
    scales, zeros = (v.tolist() for v in percentile_scales(x.T, BITS))

    def deviation(target: float) -> float:
        return sum(abs(scale - target) for scale in scales) / len(scales)

    least = min(deviation(target) for target in scales)
    ordered = sorted(scales)
    target = (ordered[CHANNELS // 2 - 1] + ordered[CHANNELS // 2]) / 2
    assert deviation(target) == pytest.approx(least)
    assert deviation(target) < 0.9 * deviation(statistics.mean(scales))
    zero = round(statistics.mean(zeros))
    return [s / target for s in scales], [s * (z - zero) for s, z in zip(scales, zeros, strict=True)]


def assert_is_the_papers(change: ChannelChange) -> None:
    ratio, offset = oracle(rows())
    assert change.ratio.tolist() == pytest.approx(ratio, rel=1e-9)
    assert change.offset.tolist() == pytest.approx(offset, rel=1e-9, abs=1e-9)


def test_the_change_is_to_the_median_scale() -> None:
    assert_is_the_papers(DopQViT(activation_bits=BITS).change(rows(), ()))


@pytest.mark.parametrize(
    "fault",
    [
        lambda: RepQViT(activation_bits=BITS).change(rows(), ()),  # the mean
        lambda: DopQViT(activation_bits=BITS + 1).change(rows(), ()),
        lambda: reparameterize_scales(*percentile_scales(rows().T, BITS), torch.tensor(1.0).double()),
    ],
)
def test_another_scale_shows(fault) -> None:
    with pytest.raises(AssertionError):
        assert_is_the_papers(fault())


class Smooth:
    num_images = 8

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        yield nn.functional.interpolate(torch.randn(8, 3, 6, 6, generator=generator), (32, 32), mode="bilinear")


def tiny() -> Model:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[:2] *= 20.0
            else:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    preprocess = Preprocess(size=(32, 32), resize=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Model(module=vit, num_classes=5, name="tiny", origin={"source": "test"}, preprocess=preprocess)


def images() -> Tensor:
    return next(iter(Smooth()))


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        out = module(images())
    return out[0] if isinstance(out, list | tuple) else out


def test_the_float_model_stays_the_same() -> None:
    model = tiny()
    graph_module = trace(model.module, (32, 32)).requires_grad_(False)
    exact = logits(graph_module)
    counts = DopQViT().prepare_(graph_module, images(), Context(progress=silent))
    assert counts == {"reparameterized": 6, "layer_norms": 6}
    assert float((logits(graph_module) - exact).norm() / exact.norm()) < 1e-4


class ByMean(DopQViT):
    """DopQ-ViT with RepQ-ViT's target, the mean scale."""

    def change(self, rows: Tensor, weights: Sequence[Tensor]) -> ChannelChange:
        return reparameterize_scales(*percentile_scales(rows.T, self.activation_bits))


@pytest.fixture(scope="module")
def compressed() -> Model:
    return pipeline.run(tiny(), Recipe((DopQViT(),)), Context(images=Smooth()))


def test_the_scale_alone_moves_nothing(compressed) -> None:
    """A LayerNorm's output and its grid scale alike, and so do weights and theirs: by median or mean, codes are one."""
    mean = pipeline.run(tiny(), Recipe((ByMean(),)), Context(images=Smooth()))
    first, second = logits(compressed.module), logits(mean.module)
    exact = logits(tiny().module)
    assert float((first - exact).norm() / exact.norm()) > 0.02
    assert float((first - second).norm()) < 0.05 * float((first - exact).norm())


def test_softmax_outputs_are_on_tanqs_grid(compressed) -> None:
    """Its values lie alike at both ends; a logarithm's don't."""
    tables = {n: q.values for n, q in compressed.module.named_modules() if isinstance(q, TableQuantizer)}
    softmax = [v for n, v in tables.items() if n.endswith("_softmax")]
    assert len(softmax) == 3
    for values in softmax:
        assert torch.allclose(values + values.flip(0), torch.ones(16), atol=1e-5)
        assert float(values.diff().std()) > 0.01  # not evenly spaced
    assert all(v is None for n, v in tables.items() if not n.endswith("_softmax"))
