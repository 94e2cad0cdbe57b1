"""Cross-shaped windows are full attention in which most pairs are masked."""

import pytest
import torch
from families import tiny

from martlet.models.cswin import CrossShapedAttention


def oracle(layer, x, num_heads):
    """Every token looks at all tokens of its stripe, one by one; (H, W, C) in float64, from eq. 2-7."""
    h, w, c = x.shape
    q, k, v = torch.nn.functional.linear(x, layer.qkv.weight.double(), layer.qkv.bias.double()).split(c, -1)
    d, out = c // num_heads, torch.zeros_like(x)
    for head in range(num_heads):
        channels = slice(head * d, (head + 1) * d)
        vertical = head < num_heads / 2
        for i in range(h):
            for j in range(w):

                def together(a, b, i=i, j=j, vertical=vertical):
                    if layer.stripe is None:
                        return True
                    return (
                        b // layer.stripe == j // layer.stripe if vertical else a // layer.stripe == i // layer.stripe
                    )

                seen = [(a, b) for a in range(h) for b in range(w) if together(a, b)]
                scores = torch.stack([q[i, j, channels] @ k[a, b, channels] for a, b in seen]) / d**0.5
                weights = scores.softmax(0)
                out[i, j, channels] = sum(p * v[a, b, channels] for p, (a, b) in zip(weights, seen, strict=True))
                for channel in range(head * d, (head + 1) * d):  # LePE: neighbours in the same stripe
                    part = c // len(layer.lepe)
                    conv = layer.lepe[channel // part]
                    out[i, j, channel] += conv.bias[channel % part].double()
                    for a, b in seen:
                        if abs(a - i) <= 1 and abs(b - j) <= 1:
                            kernel = conv.weight[channel % part, 0, a - i + 1, b - j + 1].double()
                            out[i, j, channel] += kernel * v[a, b, channel]
    return out @ layer.proj.weight.double().T + layer.proj.bias.double()


@pytest.mark.parametrize("stripe", [1, 2, None])
def test_stripes_are_masked_full_attention(stripe):
    layer = CrossShapedAttention(8, 2, stripe)
    x = torch.randn(1, 4, 6, 8)
    with torch.no_grad():
        assert torch.allclose(layer(x)[0].double(), oracle(layer, x[0].double(), 2), atol=1e-5)


def test_the_comparison_can_fail():
    layer = CrossShapedAttention(8, 2, 2)
    x = torch.randn(1, 4, 6, 8)
    with torch.no_grad():
        expected = oracle(layer, x[0].double(), 2)
        assert not torch.allclose(layer(x.transpose(1, 2)).transpose(1, 2)[0].double(), expected, atol=1e-3)


def test_stripes_of_one_are_axial_attention():
    layer = CrossShapedAttention(8, 2, 1)
    x = torch.randn(1, 4, 4, 8)
    y = x.clone()
    y[0, 2, 3] += 1
    with torch.no_grad():
        moved = (layer(y) - layer(x)).abs().amax((0, -1)) > 1e-7
    assert moved.equal(torch.tensor([[i == 2 or j == 3 for j in range(4)] for i in range(4)]))


def test_encoding_of_position_runs_at_any_resolution():
    assert all("pos" not in key and "bias_table" not in key for key in tiny("cswin_tiny").state_dict())
