"""The rational function and its gradients against float64, and what a ViT becomes with it."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import gelu
from torch.utils.flop_counter import FlopCounterMode

from martlet import models
from martlet.models.kat import PAPER, GroupRational
from martlet.models.papers.paper import figure


def oracle(x, a, b, groups):
    """(C,) in float64, channel by channel (eq. 8, 9), with the derivatives by x, a and b written out."""
    y, dx, da, db = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(a), torch.zeros_like(b)
    for c, value in enumerate(x):
        own, g = b[c // (len(x) // groups)], c // (len(x) // groups)
        above = sum(a[m] * value**m for m in range(6))
        inner = sum(own[n - 1] * value**n for n in range(1, 5))
        sign, below = (-1 if inner < 0 else 1), 1 + inner.abs()
        y[c] = above / below
        slope = sum(m * a[m] * value ** (m - 1) for m in range(1, 6))
        slope_below = sign * sum(n * own[n - 1] * value ** (n - 1) for n in range(1, 5))
        dx[c] = slope / below - above * slope_below / below**2
        for m in range(6):
            da[m] += value**m / below
        for n in range(1, 5):
            db[g, n - 1] -= sign * value**n * above / below**2
    return y, dx, da, db


@pytest.mark.parametrize("start", ["gelu", "identity", "random"])
def test_rational_function_and_its_gradients(start):
    layer, x = GroupRational("gelu" if start == "random" else start, groups=2), torch.randn(8, requires_grad=True)
    if start == "random":
        torch.nn.init.normal_(layer.numerator)
        torch.nn.init.normal_(layer.denominator)
    y = layer(x)
    y.sum().backward()
    parameters = [p.detach().double() for p in (layer.numerator, layer.denominator)]
    found = (y.detach(), x.grad, layer.numerator.grad, layer.denominator.grad)
    for ours, expected in zip(found, oracle(x.detach().double(), *parameters, 2), strict=True):
        assert torch.allclose(ours.double(), expected, rtol=1e-4, atol=1e-5)
    swapped = oracle(x.detach().double(), parameters[0], parameters[1] + 0.1, 2)
    assert not torch.allclose(y.detach().double(), swapped[0], atol=1e-4)


def test_gelu_is_fitted():
    x = torch.linspace(-6, 6, 1001)[:, None].expand(-1, 8)
    with torch.no_grad():
        assert (GroupRational("gelu")(x) - gelu(x)).abs().max() < 0.004
        assert torch.equal(GroupRational("identity")(x), x)


def test_weights_of_a_vit_give_nearly_its_logits():
    dims = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
    vit, kat = VisionTransformer(**dims).eval(), models.create("kat_tiny_patch16_224", **dims).eval()
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    missing, unexpected = kat.load_state_dict(vit.state_dict(), strict=False)
    assert unexpected == []
    assert {key.split(".")[3] for key in missing} == {"act1", "act2"}
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert (kat(x) - vit(x)).norm() < 0.02 * vit(x).norm()
        assert (kat(x.flip(0)) - vit(x)).norm() > 0.1 * vit(x).norm()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "tiny" in name else pytest.mark.slow) for name in PAPER.models]
)
def test_macs_as_the_authors_count_them(name):
    added = []  # 21 for each value of a rational function, 5 for each that is normalized; attention not at all
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        module = models.create(name).eval()
        for part in module.modules():
            cost = 21 if isinstance(part, GroupRational) else 5
            if isinstance(part, GroupRational | torch.nn.LayerNorm):
                part.register_forward_hook(lambda _, args, output, cost=cost: added.append(cost * output.numel()))
        module(torch.zeros(1, 3, 224, 224))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "bmm" not in str(op) and "attention" not in str(op)) // 2
    value, last_digit = figure(PAPER.models[name].macs)
    assert abs(products + sum(added) - value) <= last_digit / 2
    assert abs(products - value) > last_digit
