"""The spectral gate is a circular convolution; what alpha splits; MACs as the papers of this and of SVT count them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from martlet import models
from martlet.models import spectformer, svt
from martlet.models.backbone import SelfAttention
from martlet.models.spectformer import SpectralGate


def kernel(layer, h, w):
    """(H, W, C) in float64: what the gate convolves with, by the definition of the inverse transform."""
    weight = torch.view_as_complex(layer.weight.detach().double().contiguous())  # (H, W / 2 + 1, C)
    out = torch.zeros(h, w, weight.shape[-1], dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            for u in range(h):
                for v in range(w // 2 + 1):
                    turn = torch.exp(2j * torch.pi * torch.tensor(u * i / h + v * j / w, dtype=torch.float64))
                    out[i, j] += (1 if v in (0, w - v) else 2) * (weight[u, v] * turn).real / (h * w)
    return out


@pytest.mark.parametrize("size", [(3, 4), (4, 5)])
def test_gate_is_a_circular_convolution(size):
    (h, w), layer = size, SpectralGate(2, size)
    x, filters = torch.randn(1, h, w, 2), kernel(layer, h, w)
    expected = torch.zeros(h, w, 2, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            for a in range(h):
                for b in range(w):
                    expected[i, j] += filters[(i - a) % h, (j - b) % w] * x[0, a, b]
    with torch.no_grad():
        assert torch.allclose(layer(x)[0].double(), expected, atol=1e-7)
        assert not torch.allclose(layer(x.flip(1))[0].double(), expected, atol=1e-3)


def test_gate_is_torchs_transform():
    layer, x = SpectralGate(4, (14, 14)), torch.randn(2, 14, 14, 4)
    with torch.no_grad():
        spectrum = torch.fft.rfft2(x, dim=(1, 2)) * torch.view_as_complex(layer.weight)
        assert torch.allclose(layer(x), torch.fft.irfft2(spectrum, s=(14, 14), dim=(1, 2)), atol=1e-6)


def test_alpha_splits_the_stages():
    with torch.device("meta"):
        module = models.create("spectformer_h_small", spectral=3)
    kinds = [{type(block.mixer) for block in stage.blocks} for stage in module.stages]
    assert kinds == [{SpectralGate}] * 3 + [{SelfAttention}]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*spectformer.PAPER.models, *svt.PAPER.models])
def test_macs_of_convolutions_and_linear_layers_are_the_papers(name):
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        module = models.create(name).eval()
        module(torch.zeros(1, 3, 224, 224))
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert set(counts) == {"aten.addmm", "aten.bmm", "aten.convolution", "aten.mm"}
    transforms = 0  # over rows, which are `mm` as Linear layers are; those over columns, and attention, are `bmm`
    for part in module.modules():
        if isinstance(part, SpectralGate | svt.Scattering):
            h, c = (
                (part.weight.shape[0], part.weight.shape[2])
                if isinstance(part, SpectralGate)
                else part.low.shape[1::-1]
            )
            transforms += c * h * (part.rows.numel() + part.rows_back.numel())
    macs = (counter.get_total_flops() - counts["aten.bmm"]) // 2 - transforms
    assert models.paper(name).models[name].agrees("macs", macs)
