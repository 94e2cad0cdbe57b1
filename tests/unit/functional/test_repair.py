"""The closed forms give what a search of all possibilities, or a library's least squares, gives."""

import itertools

import pytest
import torch
from torch import Tensor

from martlet.functional.structure.repair import (
    Gram,
    fit,
    removal_order,
    score_bases,
    score_fit,
    units_kept,
    value_bases,
)

SAMPLES, INPUTS, OUTPUTS = 60, 6, 4


def data(seed: int = 0) -> tuple[Tensor, Tensor, Gram]:
    """Inputs that hang together, and outputs that a linear map with a bias nearly gives."""
    torch.manual_seed(seed)
    x = torch.randn(SAMPLES, INPUTS, dtype=torch.float64) @ torch.randn(INPUTS, INPUTS, dtype=torch.float64) + 1.5
    y = x @ torch.randn(INPUTS, OUTPUTS, dtype=torch.float64) + torch.randn(OUTPUTS, dtype=torch.float64)
    y = y + 0.1 * torch.randn_like(y)
    gram = Gram(INPUTS, OUTPUTS)
    for part_x, part_y in zip(x.split(17), y.split(17), strict=True):
        gram.add_(part_x, part_y)
    return x, y, gram


def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    found = torch.linalg.lstsq(x, y).solution
    return found, float((x @ found - y).square().sum())


def test_fit_is_the_least_squares_of_what_is_kept() -> None:
    x, y, gram = data()
    kept = torch.tensor([0, 2, 5])
    found = fit(gram, kept, torch.zeros(OUTPUTS, 3), ridge=0.0)
    expected, error = least_squares(x[:, kept], y)
    assert found.bias is not None
    torch.testing.assert_close(torch.cat([found.weight.mT, found.bias[None]]), expected, rtol=1e-6, atol=1e-8)
    assert found.error == pytest.approx(error, rel=1e-6)
    assert not torch.allclose(fit(gram, torch.tensor([0, 2, 4]), torch.zeros(OUTPUTS, 3), 0.0).weight, found.weight)


def test_fit_without_a_bias_is_the_least_squares_without_one() -> None:
    x, y, gram = data()
    found = fit(gram, torch.arange(INPUTS), torch.zeros(OUTPUTS, INPUTS), ridge=0.0, bias=False)
    assert found.bias is None
    torch.testing.assert_close(found.weight.mT, torch.linalg.lstsq(x, y).solution, rtol=1e-6, atol=1e-8)


def test_weights_of_samples_are_repetitions() -> None:
    x, y, _ = data()
    times = torch.randint(0, 3, (SAMPLES,), generator=torch.Generator().manual_seed(1))
    weighted, repeated = Gram(INPUTS, OUTPUTS), Gram(INPUTS, OUTPUTS)
    weighted.add_(x, y, times.double())
    repeated.add_(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0))
    torch.testing.assert_close(weighted.xx, repeated.xx)
    torch.testing.assert_close(weighted.xy, repeated.xy)
    assert weighted.yy == pytest.approx(repeated.yy)


def test_a_strong_ridge_keeps_what_was_there() -> None:
    _, _, gram = data()
    prior = torch.randn(OUTPUTS, INPUTS)
    held, free = (fit(gram, torch.arange(INPUTS), prior, ridge) for ridge in (1e9, 1e-9))
    torch.testing.assert_close(held.weight, prior.double(), rtol=1e-4, atol=1e-4)
    assert free.error < 0.5 * held.error


def test_inputs_that_repeat_each_other_are_no_trouble() -> None:
    x, y, _ = data()
    x[:, 3] = x[:, 1]
    gram = Gram(INPUTS, OUTPUTS)
    gram.add_(x, y)
    found = fit(gram, torch.arange(INPUTS), torch.zeros(OUTPUTS, INPUTS), ridge=0.0)
    assert found.error == pytest.approx(least_squares(x, y)[1], rel=1e-4)


def test_each_removal_is_the_one_that_costs_the_refit_least() -> None:
    x, y, gram = data()
    order = removal_order(gram, ridge=0.0)
    left = list(range(INPUTS))
    for number, error in zip(order.numbers.tolist(), order.errors.tolist(), strict=True):
        costs = {i: least_squares(x[:, [j for j in left if j != i]], y)[1] for i in left}
        assert number == min(costs, key=costs.__getitem__)
        assert error == pytest.approx(costs[number], rel=1e-5)
        left.remove(number)
    assert units_kept(order, 2).tolist() == sorted(order.numbers[-2:].tolist())


def heads(seed: int = 0) -> tuple[Tensor, Tensor]:
    """q and k (N, H, D) of one image, of which every k has something in common."""
    torch.manual_seed(seed)
    shape = (30, 2, 5)
    q, k = (torch.randn(shape, dtype=torch.float64) @ torch.randn(2, 5, 5, dtype=torch.float64)[0] for _ in range(2))
    return q, k + 3


def gram_by_head(x: Tensor) -> Tensor:
    return torch.einsum("nhd,nhe->hde", x, x)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("nhd,mhd->hnm", q, k)


@pytest.mark.parametrize("rank", [1, 3])
def test_score_bases_lose_no_more_than_any_scores_of_that_rank(rank: int) -> None:
    q, k = heads()
    centered = k - k.mean(0)
    bases = score_bases(gram_by_head(q), gram_by_head(centered))
    found = scores(q @ bases.first[0][:, :rank], centered @ bases.second[0][:, :rank])[0]
    exact = scores(q, centered)[0]
    best = torch.linalg.svdvals(exact)
    assert (found - exact).square().sum() == pytest.approx(float(best[rank:].square().sum()), rel=1e-4)
    assert bases.spectrum[0, rank:].sum() == pytest.approx(float(best[rank:].square().sum()), rel=1e-4)


def test_what_all_keys_share_is_not_seen_by_softmax() -> None:
    q, k = heads()
    torch.testing.assert_close(scores(q, k).softmax(-1), scores(q, k - k.mean(0)).softmax(-1))


def test_score_fit_is_the_least_squares_of_the_scores() -> None:
    q, k = heads()
    kept = torch.tensor([[0, 1, 4], [2, 3, 4]])
    share = score_fit(gram_by_head(k), kept)
    for head in range(2):
        chosen = k[:, head][:, kept[head]]
        found = (q[:, head] @ share[head]) @ chosen.mT
        expected = (torch.linalg.lstsq(chosen, k[:, head] @ q[:, head].mT).solution.mT) @ chosen.mT
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", [7, 3])
def test_value_bases_lose_no_more_than_any_of_that_rank(features: int) -> None:
    z, _ = heads()
    z = z - z.mean(0)
    proj = torch.randn(features, 2, 5, dtype=torch.float64)
    rank = 2
    whole, bases = (value_bases(gram_by_head(z), proj, size) for size in (5, rank))
    torch.testing.assert_close(whole.first @ whole.second, torch.eye(5, dtype=torch.float64).expand(2, -1, -1))
    for head in range(2):
        exact = z[:, head] @ proj[:, head].mT
        through = bases.first[head] @ bases.second[head]
        lost = float((z[:, head] @ through @ proj[:, head].mT - exact).square().sum())
        best = float(torch.linalg.svdvals(exact)[rank:].square().sum())
        assert lost == pytest.approx(best, rel=1e-4, abs=1e-8)
        picks = [list(pick) for pick in itertools.combinations(range(5), rank)]
        assert lost <= min(float((z[:, head][:, p] @ proj[:, head][:, p].mT - exact).square().sum()) for p in picks)
