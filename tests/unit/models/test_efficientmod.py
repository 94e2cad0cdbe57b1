"""The modulation block from its equations, in float64."""

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear

from martlet.models.efficientmod import Modulation


def oracle(layer, x, ratio):
    """x + scale · fc2(fc1(n) ∘ repeat(g(gelu(dw(f(n)))))); (H, W, C), the convolution by its definition."""
    h, w, c = x.shape
    n = layer_norm(x, (c,), layer.norm.weight.double(), layer.norm.bias.double())
    f = linear(n, layer.f.weight.double(), layer.f.bias.double())
    kernel, r = layer.context.weight.double(), layer.context.kernel_size[0] // 2
    context = layer.context.bias.double().expand(h, w, c).clone()
    for i in range(h):
        for j in range(w):
            for a in range(max(0, i - r), min(h, i + r + 1)):
                for b in range(max(0, j - r), min(w, j + r + 1)):
                    context[i, j] += kernel[:, 0, a - i + r, b - j + r] * f[a, b]
    context = linear(gelu(context), layer.g.weight.double(), layer.g.bias.double())
    value = linear(n, layer.fc1.weight.double(), layer.fc1.bias.double())
    value = (value if ratio == 1 else gelu(value)) * context.repeat(1, 1, ratio)
    return x + layer.scale.gamma.double() * linear(value, layer.fc2.weight.double(), layer.fc2.bias.double())


@pytest.mark.parametrize("ratio", [1, 3])
def test_modulation_is_the_papers(ratio):
    layer, x = Modulation(6, ratio, 3, 0.0), torch.randn(1, 4, 5, 6)
    with torch.no_grad():
        layer.scale.gamma.normal_()
        expected = oracle(layer, x[0].double(), ratio)
        assert torch.allclose(layer(x)[0].double(), expected, atol=1e-5)
        layer.context.weight.neg_()
        assert not torch.allclose(layer(x)[0].double(), expected, atol=1e-3)
