"""AdaRound (arXiv 2004.10568) and QDrop (arXiv 2203.05740) against their equations in plain Python and float64."""

import itertools
import math

import pytest
import torch

from martlet.functional.quantize import adaround
from martlet.functional.quantize.adaround import (
    annealed_beta,
    drop_quantization,
    initial_rounding,
    learned_codes,
    rectified_sigmoid,
    rounding_regularizer,
    soft_weight,
)

BITS = 4
WEIGHT = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
SCALE = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.02]).double()[:, None]  # the last row saturates
ZERO = torch.tensor([8.0, 7, 3, 8, 8]).double()[:, None]
V = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).double() * 3


def oracle_h(v: float) -> float:
    return min(max(1 / (1 + math.exp(-v)) * 1.2 - 0.1, 0.0), 1.0)


def oracle_soft(w: float, v: float, scale: float, zero: float) -> float:
    return scale * (min(max(math.floor(w / scale) + oracle_h(v) + zero, 0), 2**BITS - 1) - zero)


def assert_soft_weight(function) -> None:
    found = function(WEIGHT, V, SCALE, ZERO, BITS)
    for o, i in itertools.product(range(5), range(7)):
        expected = oracle_soft(*(float(t) for t in (WEIGHT[o, i], V[o, i], SCALE[o, 0], ZERO[o, 0])))
        assert float(found[o, i]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_soft_weights_are_equation_22():
    assert_soft_weight(soft_weight)
    assert rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "fault",
    [
        lambda w, v, s, z, b: soft_weight(w, -v, s, z, b),
        lambda w, v, s, z, b: soft_weight(w, v + 0.05, s, z, b),
        lambda w, v, s, z, b: soft_weight(w, v, s, z + 1, b),
        lambda w, v, s, z, b: soft_weight(w, v, s, z, b - 1),
        lambda w, v, s, z, b: (torch.floor(w / s) + torch.sigmoid(v)) * s,
    ],
)
def test_a_fault_in_soft_weights_shows(fault):
    with pytest.raises(AssertionError):
        assert_soft_weight(fault)


def test_the_first_soft_weight_is_the_weight():
    """In closed form: h(V) is the fraction, so nothing is rounded but for what is beyond the grid."""
    v = initial_rounding(WEIGHT, SCALE)
    zero = torch.tensor(128.0)
    assert torch.allclose(soft_weight(WEIGHT, v, SCALE, zero, 8)[:4], WEIGHT[:4], atol=1e-12)
    off = soft_weight(WEIGHT, initial_rounding(WEIGHT, SCALE * 1.1), SCALE, zero, 8)
    assert not torch.allclose(off[:4], WEIGHT[:4], atol=1e-3)
    whole = torch.tensor([-2.0, 0.0, 3.0]).double()  # fractions of 0 have a finite V, too
    assert torch.isfinite(initial_rounding(whole, torch.ones(3))).all()


def test_the_first_codes_round_to_nearest():
    v = initial_rounding(WEIGHT, SCALE)
    nearest = (torch.floor(WEIGHT / SCALE + 0.5) + ZERO).clamp(0, 15)
    codes = learned_codes(WEIGHT, v, SCALE, ZERO, BITS)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, nearest.byte())
    up = learned_codes(WEIGHT, torch.full_like(v, 9.0), SCALE, ZERO, BITS)
    assert torch.equal(up, (torch.floor(WEIGHT / SCALE) + 1 + ZERO).clamp(0, 15).byte())


@pytest.mark.parametrize("beta", [20.0, 2.0, 0.5])
def test_the_regularizer_is_equation_24(beta):
    expected = sum(1 - abs(2 * oracle_h(v) - 1) ** beta for v in V.flatten().tolist())
    assert float(rounding_regularizer(V, beta)) == pytest.approx(expected, rel=1e-12)
    assert float(rounding_regularizer(V, beta * 1.1)) != pytest.approx(expected, rel=1e-3)
    assert float(rounding_regularizer(torch.tensor([-9.0, 9.0]), beta)) == 0.0
    assert float(rounding_regularizer(torch.zeros(3), beta)) == 3.0


def test_the_regularizers_gradient_is_its_derivative():
    v = V.clone().requires_grad_()
    rounding_regularizer(v, 3.0).backward()
    gradient = v.grad
    assert gradient is not None
    for place, x in zip(gradient.flatten().tolist(), V.flatten().tolist(), strict=True):
        h, sigmoid = oracle_h(x), 1 / (1 + math.exp(-x))
        inside = 0 < h < 1
        slope = -3.0 * abs(2 * h - 1) ** 2 * math.copysign(1, 2 * h - 1) * 2 * 1.2 * sigmoid * (1 - sigmoid)
        assert place == pytest.approx(slope if inside else 0.0, rel=1e-9, abs=1e-12)


def test_beta_falls_linearly_after_the_warm_up():
    betas = [annealed_beta(step, 100) for step in range(100)]
    assert betas[:20] == [None] * 20
    assert betas[20] == 20.0
    assert betas[60] == pytest.approx(11.0)
    assert betas[99] == pytest.approx(2 + 18 / 80)
    assert annealed_beta(0, 10, warmup_ratio=0.0, first=10.0) == 10.0


def test_learning_comes_near_the_best_of_all_roundings():
    """One output, eight inputs: all 256 ways of rounding up or down can be tried."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(1, 8, generator=generator).double()
    rows = torch.randn(40, 8, generator=generator).double() @ torch.randn(8, 8, generator=generator).double()
    hessian, scale, zero = rows.T @ rows / 40, torch.tensor(0.5).double(), torch.tensor(8.0).double()

    def error(rounded: torch.Tensor) -> float:
        return float((rounded - weight) @ hessian @ (rounded - weight).T)

    floor = torch.floor(weight / scale)
    errors = sorted(error((floor + torch.tensor(up)) * scale) for up in itertools.product([0.0, 1.0], repeat=8))
    v = initial_rounding(weight, scale).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=0.03)
    for step in range(400):
        difference = soft_weight(weight, v, scale, zero, BITS) - weight
        loss = (difference @ hessian @ difference.T).sum()
        if (beta := annealed_beta(step, 400)) is not None:
            loss = loss + rounding_regularizer(v, beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(rounding_regularizer(v.detach(), 2.0)) < 0.1  # decided
    learned = (learned_codes(weight, v, scale, zero, BITS).double() - zero) * scale
    nearest = torch.round(weight / scale) * scale
    assert error(learned) < 0.7 * error(nearest)
    assert error(learned) <= errors[3]  # of 256


def test_dropping_quantization_mixes_by_element():
    x, rounded = torch.zeros(400, 50), torch.ones(400, 50)
    for ratio in (0.0, 0.25, 0.5, 1.0):
        found = drop_quantization(x, rounded, ratio, torch.Generator().manual_seed(0))
        assert set(found.unique().tolist()) <= {0.0, 1.0}
        assert float((found == 0).float().mean()) == pytest.approx(ratio, abs=0.02)
    half = drop_quantization(x, rounded, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(half, drop_quantization(x, rounded, 0.5, torch.Generator().manual_seed(0)))
    assert 0 < float(half[0].mean()) < 1  # not whole rows
    assert 0 < float(half[:, 0].mean()) < 1


def test_impossible_arguments_are_refused():
    for call in (
        lambda: soft_weight(WEIGHT, V, SCALE, ZERO, 1),
        lambda: learned_codes(WEIGHT, V, SCALE, ZERO, 9),
        lambda: rounding_regularizer(V, 0.0),
        lambda: annealed_beta(10, 10),
        lambda: annealed_beta(0, 10, warmup_ratio=1.0),
        lambda: drop_quantization(V, V, 1.5),
        lambda: drop_quantization(V, V[:1]),
    ):
        with pytest.raises(ValueError, match=r"bits|beta|step|ratio|shape|values"):
            call()
    assert adaround.STRETCH_LOW < 0 < 1 < adaround.STRETCH_HIGH
