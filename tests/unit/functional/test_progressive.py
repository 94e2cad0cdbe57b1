"""Progressive weights against integers, one by one (Lin et al., QServe, arXiv 2405.04532); and that a fault shows."""

import pytest
import torch
from torch import Tensor

from martlet.functional.quantize.progressive import ProgressiveWeight, progressive_weight, protective_range


def oracle(weight: Tensor, size: int, bits: int) -> list[list[int]]:
    """The int8 values that a kernel multiplies, in plain Python."""
    rows = []
    for row in weight.tolist():
        scale = (max(map(abs, row)) or 1.0) / protective_range(bits)
        wide = [round(x / scale) for x in row]
        widened = []
        for start in range(0, len(row), size):
            group = wide[start : start + size]
            low, high = min(0, *group), max(0, *group)
            step = max(1, round((high - low) / (2**bits - 1)))
            zero = min(max(round(-low / step), 0), 2**bits - 1)
            widened += [(min(max(round(x / step) + zero, 0), 2**bits - 1) - zero) * step for x in group]
        rows.append(widened)
    return rows


def weights(seed: int, rows: int = 7, columns: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight[1] = weight[1].abs()  # one-sided
    weight[2, ::5] *= 20  # outliers
    weight[3] = 0
    return weight


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [4, 8, 24])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_what_integers_give(seed: int, size: int, bits: int) -> None:
    weight = weights(seed)
    found = progressive_weight(weight, size, bits)
    assert found.widened().tolist() == oracle(weight, size, bits)
    assert int(found.codes.max()) < 2**bits
    assert int(found.zero.max()) < 2**bits
    for fault in (found._replace(step=found.step + 1), found._replace(zero=found.zero + 1)):
        assert fault.widened().tolist() != oracle(weight, size, bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_group_leaves_int8(bits: int) -> None:
    """Every range that a group of 8-bit codes can have, and every code in it."""
    last, greatest = 2**bits - 1, protective_range(bits)
    wide = torch.arange(-greatest, greatest + 1, dtype=torch.float64)  # (x)
    high = torch.arange(greatest + 1, dtype=torch.float64)[:, None]  # (h, 1)
    for low in range(-greatest, 1):
        step = torch.round((high - low) / last).clamp(min=1)
        zero = torch.round(-low / step).clamp(0, last)
        widened = ((torch.round(wide / step) + zero).clamp(0, last) - zero) * step  # (h, x)
        inside = widened[(wide >= low) & (wide <= high)]
        assert float(inside.min()) >= -128
        assert float(inside.max()) <= 127


def test_without_the_protective_range_some_would() -> None:
    """128 + 127 in steps of 17 from a zero of 8: the range that the paper protects."""
    found = ProgressiveWeight(
        torch.tensor([[0, 15]], dtype=torch.uint8),
        torch.tensor([[8]], dtype=torch.uint8),
        torch.tensor([[17]], dtype=torch.int32),
        torch.ones(1, 1),
    )
    assert found.widened().min() < -128


def test_two_steps_cost_little_over_one() -> None:
    weight = weights(1, 40, 256)
    found = progressive_weight(weight, 32)
    error = (found.widened() * found.scale - weight).square().mean()
    low, high = weight.unflatten(1, (-1, 32)).amin(2), weight.unflatten(1, (-1, 32)).amax(2)
    step = ((high - low) / 15).repeat_interleave(32, 1)
    assert error < 1.6 * (step.square() / 12).mean()


@pytest.mark.parametrize("size", [0, 5])
def test_groups_that_do_not_divide_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="don't divide 24 columns"):
        progressive_weight(weights(0), size)
