"""The operator against a direct convolution in float64, in both directions; the filter from its formula; the hosts."""

from math import cos, exp, log, pi, sin

import pytest
import torch
from torch.nn.functional import linear

from martlet import models
from martlet.models.backbone import SelfAttention
from martlet.models.hyena_nd import HyenaOperator, ImplicitFilter


def random_(layer):
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def filter_oracle(layer, channel, dim, i, j, h, w):
    """One value of the filter, its network evaluated at one place."""
    s, t = i / (h - 1), j / (w - 1)
    x = torch.tensor([s, cos(2 * pi * s), sin(2 * pi * s), t, cos(2 * pi * t), sin(2 * pi * t)]).double()
    first, sine, second, _, third, _, last = layer.layers
    for part in (first, second, third):
        x = (sine.frequency.double() * linear(x, part.weight.double(), part.bias.double())).sin()
    slow, fast = log(100) / 1.5, log(100) / 0.3
    return last.weight[channel].double() @ x * exp(-(s + t) * (slow + (fast - slow) * channel / (dim - 1)))


def oracle(layer, x):
    """(H, W, C) in float64; the long convolution by its definition."""
    (h, w, c), sign = x.shape, -1 if layer.backward_filter else 1
    u = linear(x, layer.project.weight.double(), layer.project.bias.double())
    short = layer.short.bias.double().expand(h, w, 3 * c).clone()
    for i in range(h):
        for j in range(w):
            for di in range(max(0, i - 1), min(h, i + 2)):
                for dj in range(max(0, j - 1), min(w, j + 2)):
                    short[i, j] += layer.short.weight[:, 0, di - i + 1, dj - j + 1].double() * u[di, dj]
    a, b, v = short.split(c, -1)
    v, k = b * v, layer.long().double()
    y = layer.skip[:, 0, 0].double() * v
    for i in range(h):
        for j in range(w):
            for di in range(h):
                for dj in range(w):
                    p, q = i - sign * di, j - sign * dj
                    if 0 <= p < h and 0 <= q < w:
                        y[i, j] += k[:, di, dj] * v[p, q]
    return linear(a * y, layer.out.weight.double(), layer.out.bias.double())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("size", [(4, 5), (3, 3)])
def test_operator_is_direct_convolution_and_gates(size, backward):
    layer, x = random_(HyenaOperator(4, size, backward)), torch.randn(1, *size, 4)
    with torch.no_grad():
        expected = oracle(layer, x[0].double())
        assert torch.allclose(layer(x)[0].double(), expected, atol=1e-5)
        layer.backward_filter = not backward
        assert not torch.allclose(layer(x)[0].double(), expected, atol=1e-3)


def test_filter_is_a_network_of_the_place_in_a_decaying_window():
    layer = random_(ImplicitFilter(3, (4, 5)))
    with torch.no_grad():
        found = layer()
        for channel, i, j in [(0, 0, 0), (1, 2, 3), (2, 3, 4), (0, 3, 1)]:
            assert abs(found[channel, i, j] - filter_oracle(layer, channel, 3, i, j, 4, 5)) < 1e-6
        assert abs(found[0, 2, 3] - filter_oracle(layer, 0, 3, 3, 2, 4, 5)) > 1e-4


def test_every_other_block_filters_backwards_and_hybrids_end_in_attention():
    with torch.device("meta"):
        blocks = models.create("hyena_deit_tiny_hybrid_patch16_224").stages[0].blocks
        swin = models.create("hyena_swin_tiny_patch4_224")
    assert [type(block.mixer) for block in blocks] == [HyenaOperator] * 7 + [SelfAttention] * 5
    assert [block.mixer.backward_filter for block in blocks[:7]] == [True, False] * 3 + [True]
    assert [stage.blocks[0].mixer.rows.shape[0] for stage in swin.stages] == [56, 28, 14, 7]
