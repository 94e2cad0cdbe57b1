"""Changes of channels in plain Python and float64: RepQ-ViT (arXiv 2212.08254), MPTQ-ViT (arXiv 2401.14895)."""

import statistics

import pytest
import torch

from martlet.functional.quantize.affine import quantize
from martlet.functional.quantize.reparameterize import (
    ScaleReparameterization,
    median_scale,
    reparameterize_scales,
    smooth_with_bias,
)

CHANNELS, OUTPUTS = 6, 4


def layers(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
    return {
        "x": draw(30, CHANNELS),
        "gamma": draw(CHANNELS) * torch.tensor([0.1, 1, 1, 3, 10, 30]),
        "beta": draw(CHANNELS),
        "weight": draw(OUTPUTS, CHANNELS),
        "bias": draw(OUTPUTS),
        "scale": torch.tensor([0.01, 0.2, 0.25, 0.7, 2.0, 7.0]).double(),
        "zero": torch.tensor([3.0, 9, 8, 1, 12, 6]).double(),
    }


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, (CHANNELS,), weight, bias)


def oracle(p: dict[str, torch.Tensor], target_scale: float, target_zero: float) -> dict[str, list]:
    """The equations, channel by channel, on lists."""
    s, z = p["scale"].tolist(), p["zero"].tolist()
    gamma, beta, weight, bias = (p[k].tolist() for k in ("gamma", "beta", "weight", "bias"))
    r1 = [s[j] / target_scale for j in range(CHANNELS)]
    r2 = [z[j] - target_zero for j in range(CHANNELS)]
    return {
        "gamma": [gamma[j] / r1[j] for j in range(CHANNELS)],
        "beta": [(beta[j] + s[j] * r2[j]) / r1[j] for j in range(CHANNELS)],
        "weight": [[weight[i][j] * r1[j] for j in range(CHANNELS)] for i in range(OUTPUTS)],
        "bias": [bias[i] - sum(weight[i][j] * s[j] * r2[j] for j in range(CHANNELS)) for i in range(OUTPUTS)],
    }


def assert_is_the_papers(change: ScaleReparameterization, p: dict[str, torch.Tensor]) -> None:
    gamma, beta = change.into_norm(p["gamma"], p["beta"])
    weight, bias = change.into_linear(p["weight"], p["bias"])
    target_scale, target_zero = statistics.mean(p["scale"].tolist()), round(statistics.mean(p["zero"].tolist()))
    assert float(change.scale) == pytest.approx(target_scale)
    assert float(change.zero_point) == target_zero
    expected = oracle(p, target_scale, target_zero)
    for name, found in [("gamma", gamma), ("beta", beta), ("weight", weight), ("bias", bias)]:
        assert torch.allclose(found, torch.tensor(expected[name], dtype=torch.float64), rtol=1e-12, atol=1e-12), name
    exact = norm(p["x"], p["gamma"], p["beta"]) @ p["weight"].T + p["bias"]
    assert torch.allclose(norm(p["x"], gamma, beta) @ weight.T + bias, exact, atol=1e-10)
    # one grid gives each channel the codes of its own
    own = quantize(norm(p["x"], p["gamma"], p["beta"]), p["scale"], p["zero"].byte())
    one = quantize(norm(p["x"], gamma, beta), change.scale, change.zero_point.byte())
    assert torch.equal(own, one)


def test_reparameterization_is_the_papers():
    p = layers()
    assert_is_the_papers(reparameterize_scales(p["scale"], p["zero"]), p)


@pytest.mark.parametrize(
    "fault",
    [
        lambda c: ScaleReparameterization(1 / c.ratio, c.offset, c.scale, c.zero_point),
        lambda c: ScaleReparameterization(c.ratio, -c.offset, c.scale, c.zero_point),
        lambda c: ScaleReparameterization(c.ratio, c.offset / c.ratio, c.scale, c.zero_point),
        lambda c: ScaleReparameterization(c.ratio * 1.1, c.offset, c.scale, c.zero_point),
        lambda c: ScaleReparameterization(c.ratio, c.offset, c.scale * 1.1, c.zero_point),
        lambda c: ScaleReparameterization(c.ratio, c.offset, c.scale, c.zero_point + 1),
    ],
)
def test_a_fault_in_the_reparameterization_shows(fault):
    p = layers()
    with pytest.raises(AssertionError):
        assert_is_the_papers(fault(reparameterize_scales(p["scale"], p["zero"])), p)


@pytest.mark.parametrize("target", [(0.3, 4.0), (5.0, 0.0), (1e-3, 255.0)])
def test_no_target_changes_the_float_model(target):
    p = layers(3)
    scale, zero = (torch.tensor(v, dtype=torch.float64) for v in target)
    change = reparameterize_scales(p["scale"], p["zero"], scale, zero)
    weight, bias = change.into_linear(p["weight"], p["bias"])
    exact = norm(p["x"], p["gamma"], p["beta"]) @ p["weight"].T + p["bias"]
    found = norm(p["x"], *change.into_norm(p["gamma"], p["beta"])) @ weight.T + bias
    assert torch.allclose(found, exact, rtol=1e-8, atol=1e-8)


def test_missing_biases_count_as_zero():
    p = layers(4)
    change, none = reparameterize_scales(p["scale"], p["zero"]), torch.zeros(CHANNELS, dtype=torch.float64)
    assert torch.equal(change.into_norm(p["gamma"], None)[1], change.into_norm(p["gamma"], none)[1])
    assert torch.equal(change.into_linear(p["weight"], None)[1], change.into_linear(p["weight"], none[:OUTPUTS])[1])


def test_integer_zero_points_are_taken():
    p = layers()
    found = reparameterize_scales(p["scale"], p["zero"].to(torch.uint8))
    assert torch.equal(found.offset, reparameterize_scales(p["scale"], p["zero"]).offset)


@pytest.mark.parametrize("values", [[1.0, 2.0, 50.0], [1.0, 2.0, 4.0, 50.0], [3.0]])
def test_median_scale_is_the_median(values):
    assert float(median_scale(torch.tensor(values))) == statistics.median(values)


def test_impossible_scales_are_refused():
    ok = torch.ones(3)
    for scale, zero, target in [
        (torch.tensor([1.0, 0.0, 1.0]), ok, None),
        (torch.tensor([1.0, float("inf"), 1.0]), ok, None),
        (ok, torch.ones(2), None),
        (torch.tensor(1.0), torch.tensor(1.0), None),
        (ok, ok, torch.tensor(-1.0)),
    ]:
        with pytest.raises(ValueError, match=r"scale"):
            reparameterize_scales(scale, zero, target)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75])
def test_sq_b_centres_then_smooths_and_leaves_the_float_model(alpha):
    p = layers(5)
    x = norm(p["x"], p["gamma"], p["beta"])
    change = smooth_with_bias(x, p["weight"].abs().amax(0), alpha)
    gamma, beta = change.into_norm(p["gamma"], p["beta"])
    weight, bias = change.into_linear(p["weight"], p["bias"])
    moved = norm(p["x"], gamma, beta)
    assert torch.allclose(moved @ weight.T + bias, x @ p["weight"].T + p["bias"], atol=1e-10)
    assert float(moved.mean(0).abs().max()) < 1e-12
    factors = []
    for j in range(CHANNELS):
        column = x[:, j].tolist()
        mean = statistics.mean(column)
        most = max(abs(value - mean) for value in column)
        factors.append(most**alpha / max(abs(w) for w in p["weight"][:, j].tolist()) ** (1 - alpha))
        assert float(change.offset[j]) == pytest.approx(-mean, rel=1e-12)
    mean = statistics.geometric_mean(factors)
    assert change.ratio.tolist() == pytest.approx([f / mean for f in factors], rel=1e-9)
    off_centre = smooth_with_bias(x[:3], p["weight"].abs().amax(0), alpha)
    assert not torch.allclose(off_centre.offset, change.offset, atol=0.1)
