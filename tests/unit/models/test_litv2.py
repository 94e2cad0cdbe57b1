"""HiLo head by head, and the deformable merging against torchvision's deformable convolution."""

import pytest
import torch
from torch.nn.functional import gelu, linear
from torchvision.ops import deform_conv2d

from martlet.models.litv2 import DeformableMerging, HiLo


def heads_of(layer, x, num_heads):
    return linear(x, layer.weight.double(), layer.bias.double()).unflatten(-1, (num_heads, -1))


def oracle(layer, x):
    """(H, W, C) in float64, token by token: Hi-Fi heads see their window, Lo-Fi heads the mean of each."""
    h, w, _ = x.shape
    s, parts = layer.window, []
    if layer.high_heads:
        q, k, v = heads_of(layer.high_qkv, x, 3 * layer.high_heads).split(layer.high_heads, -2)
        out = torch.zeros_like(q)
        for i in range(h):
            for j in range(w):
                seen = [(a, b) for a in range(h) for b in range(w) if (a // s, b // s) == (i // s, j // s)]
                scores = torch.stack([(q[i, j] * k[a, b]).sum(-1) for a, b in seen]) / q.shape[-1] ** 0.5
                out[i, j] = sum(p[:, None] * v[a, b] for p, (a, b) in zip(scores.softmax(0), seen, strict=True))
        parts.append(linear(out.flatten(2), layer.high_proj.weight.double(), layer.high_proj.bias.double()))
    if layer.low_heads:
        means = [x[a : a + s, b : b + s].mean((0, 1)) for a in range(0, h, s) for b in range(0, w, s)]
        q = heads_of(layer.low_q, x, layer.low_heads)
        k, v = heads_of(layer.low_kv, torch.stack(means), 2 * layer.low_heads).split(layer.low_heads, -2)
        weights = (torch.einsum("ijnd,mnd->ijnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        out = torch.einsum("ijnm,mnd->ijnd", weights, v).flatten(2)
        parts.append(linear(out, layer.low_proj.weight.double(), layer.low_proj.bias.double()))
    return torch.cat(parts, -1)


@pytest.mark.parametrize(("window", "alpha"), [(2, 0.5), (2, 0.9), (2, 0.0), (2, 1.0), (1, 0.5)])
def test_hilo_is_the_papers(window, alpha):
    layer, x = HiLo(16, 4, window, alpha), torch.randn(1, 4, 6, 16)
    with torch.no_grad():
        assert torch.allclose(layer(x)[0].double(), oracle(layer, x[0].double()), atol=1e-5)


def test_the_comparison_can_fail():
    layer, x = HiLo(16, 4, 2, 0.5), torch.randn(1, 4, 4, 16)
    with torch.no_grad():
        other = layer(x.roll(1, 1)).roll(-1, 1)
        assert not torch.allclose(other[0].double(), oracle(layer, x[0].double()), atol=1e-3)


def test_alpha_splits_the_heads():
    assert [(layer.low_heads, layer.high_heads) for layer in (HiLo(96, 12, 2, 0.9), HiLo(96, 12, 2, 0.0))] == [
        (10, 2),
        (0, 12),
    ]


def test_merging_is_a_deformable_convolution():
    layer, x = DeformableMerging(4, 6).eval(), torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        torch.nn.init.normal_(layer.offset.weight, std=0.5)
        layer.norm.running_var.uniform_(0.5, 2)
        offset = layer.offset(x)
        expected = deform_conv2d(x, offset, layer.conv.weight, layer.conv.bias, stride=2)
        assert torch.allclose(layer(x), gelu(layer.norm(expected)), atol=1e-5)
        assert not torch.allclose(layer(x), gelu(layer.norm(layer.conv(x))), atol=1e-2)  # offsets matter
