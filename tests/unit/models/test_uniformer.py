"""Local relation aggregation from its equation; shallow stages see their neighbourhood, deep ones everything."""

import torch
from families import images, tiny

from martlet.models.uniformer import LocalMixer


def oracle(layer, x):
    """(C, H, W) in float64: U Σ_j a_(i-j) V(x_j) over the 5 × 5 tokens j around i (eq. 5)."""
    value, affinity, output = layer
    v = torch.einsum("oc,chw->ohw", value.weight[..., 0, 0].double(), x) + value.bias.double()[:, None, None]
    mixed = affinity.bias.double()[:, None, None].expand_as(v).clone()
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            for a in range(max(0, i - 2), min(x.shape[1], i + 3)):
                for b in range(max(0, j - 2), min(x.shape[2], j + 3)):
                    mixed[:, i, j] += affinity.weight[:, 0, a - i + 2, b - j + 2].double() * v[:, a, b]
    return torch.einsum("oc,chw->ohw", output.weight[..., 0, 0].double(), mixed) + output.bias.double()[:, None, None]


def test_local_aggregation_is_the_papers():
    layer, x = LocalMixer(4), torch.randn(1, 4, 5, 6)
    with torch.no_grad():
        assert torch.allclose(layer(x)[0].double(), oracle(layer, x[0].double()), atol=1e-5)
        assert not torch.allclose(layer(x.flip(-1)).flip(-1)[0].double(), oracle(layer, x[0].double()), atol=1e-3)


def test_shallow_is_local_and_deep_is_global():
    module, x = tiny("uniformer_small"), images((64, 64), 1)
    y = x.clone()
    y[..., :4, :4] += 1
    with torch.no_grad():
        (before, deep), (moved, deeply) = (module.forward_intermediates(one, intermediates_only=True) for one in (x, y))
    shallow = (moved - before).abs().amax((0, 1)) > 0
    assert shallow[0, 0]
    assert not shallow[8:, 8:].any()
    assert ((deeply - deep).abs().amax((0, 1)) > 0).all()
