"""Stopping early against plain Python in float64: who leaves where, thresholds for budgets, windows, heads, similarity;
and that a fault would show.

Yue et al., DeeR-VLA, 2024, arXiv 2411.02359; Xia and Bouganis, 2023, arXiv 2303.08010; Xu et al., LGViT, 2023,
arXiv 2308.00255, section 3.2; Tang et al., MuE, 2023, arXiv 2211.11152. Of the first, the second and the last, facts of
the authors' code.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from martlet.functional import exits as solver
from martlet.functional.exits import Budget
from martlet.nn.exit_heads import AggregationHead, LinearHead, PerceptionHead, Readout
from martlet.nn.exits import similarity, top_probability

COSTS = np.array([1.0, 2.5, 4.0])


def sample(count: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences (2, N), and answers (3, N) that are right more often the surer, and the later, they are."""
    rng = np.random.default_rng(seed)
    confidences = rng.uniform(0.1, 1, (2, count))
    chance = np.vstack([confidences[0], 0.3 + 0.7 * confidences[1], np.full(count, 0.95)])
    return confidences, rng.uniform(size=(3, count)) < chance


def oracle_plan(confidences, right, costs, limits) -> tuple[list[int], float, float]:
    """Exits, mean cost and share of wrong answers: image by image."""
    exits, cost, wrong = [], 0.0, 0
    for i in range(len(confidences[0])):
        k = 0
        while k < len(limits) and not confidences[k][i] >= limits[k]:
            k += 1
        exits.append(k)
        cost += costs[k]
        wrong += not right[k][i]
    return exits, cost / len(exits), wrong / len(exits)


def oracle_thresholds(confidences, wanted: list[float]) -> list[float]:
    """Equation by equation: of the images that are left, the n-th surest, n being the share of all that is to leave."""
    left, found = set(range(len(confidences[0]))), []
    for k, values in enumerate(confidences):
        n = math.floor(len(values) * wanted[k] + 1e-9)
        order = sorted(left, key=lambda i: -values[i])
        found.append(math.inf if n == 0 or not order else values[order[min(n, len(order)) - 1]])
        left = {i for i in left if values[i] < found[-1]}
    return found


def oracle_solve(confidences, right, costs, mean=None, lost=None) -> float:
    """The least share of wrong answers within a mean cost, or the least cost with so many lost: over every base."""
    ratios = [math.exp(12 - 24 * i / (solver.LEVELS - 1)) for i in range(solver.LEVELS)]
    best, last = math.inf, 1 - sum(right[-1]) / len(right[-1])
    candidates = [[math.inf] * 2, [-math.inf] * 2]
    for ratio in ratios:
        powers = [ratio**k for k in (1, 2, 3)]
        candidates.append(oracle_thresholds(confidences, [p / sum(powers) for p in powers]))
    for limits in candidates:
        _, cost, wrong = oracle_plan(confidences, right, costs, limits)
        if mean is not None and cost <= mean + 1e-9:
            best = min(best, wrong)
        if lost is not None and wrong <= last + lost + 1e-9:
            best = min(best, cost)
    return best


def test_who_leaves_where():
    confidences, right = sample()
    for limits in ([0.5, 0.5], [math.inf, 0.2], [-math.inf, 0.5], [0.9, math.inf]):
        exits, cost, wrong = oracle_plan(confidences, right, COSTS, limits)
        assert solver.decide(confidences, limits).tolist() == exits
        found = solver.plan(confidences, right, COSTS, limits)
        assert found.cost == pytest.approx(cost)
        assert found.wrong == pytest.approx(wrong)


def test_without_exits_all_leave_at_the_last():
    right = np.array([[True, False, True, True]])
    found = solver.solve(np.empty((0, 4)), right, COSTS[:1], Budget(lost=0.0))
    assert (found.cost, found.wrong, found.share.tolist()) == (1.0, 0.25, [1.0])


@pytest.mark.parametrize("ratio", [0.05, 0.6, 1.0, 1.7, 30.0])
def test_thresholds_spread_images_as_wanted(ratio):
    confidences, _ = sample()
    wanted = solver.shares(ratio, 3)
    assert wanted == pytest.approx([ratio**k / sum(ratio**j for j in (1, 2, 3)) for k in (1, 2, 3)])
    found = solver.thresholds(confidences, wanted)
    assert found == pytest.approx(oracle_thresholds(confidences.tolist(), wanted.tolist()))
    share = np.bincount(solver.decide(confidences, found), minlength=3) / 60
    assert share[:2] == pytest.approx(np.floor(60 * wanted[:2] + 1e-9) / 60)


@pytest.mark.parametrize("mean", [1.2, 2.0, 3.3])
def test_a_mean_budget_is_kept_with_the_fewest_errors(mean):
    confidences, right = sample()
    found = solver.solve(confidences, right, COSTS, Budget(mean=mean))
    assert found.cost <= mean + 1e-9
    assert found.wrong == pytest.approx(oracle_solve(confidences, right, COSTS, mean=mean))


@pytest.mark.parametrize("lost", [0.0, 0.05, 0.2])
def test_a_limit_on_what_is_lost_is_kept_at_the_least_cost(lost):
    confidences, right = sample()
    found = solver.solve(confidences, right, COSTS, Budget(lost=lost))
    assert found.wrong <= 1 - right[-1].mean() + lost + 1e-9
    assert found.cost == pytest.approx(oracle_solve(confidences, right, COSTS, lost=lost))


def test_the_solver_is_near_the_best_of_all_thresholds():
    confidences, right = sample(400, seed=3)
    grid = [[-math.inf, *np.quantile(each, np.linspace(0, 1, 25)), math.inf] for each in confidences]
    best = min(solver.plan(confidences, right, COSTS, pair).wrong for pair in itertools.product(*grid)
               if solver.plan(confidences, right, COSTS, pair).cost <= 2.5)  # fmt: skip
    found = solver.solve(confidences, right, COSTS, Budget(mean=2.5)).wrong
    assert best <= found <= best + 0.05


def test_no_plan_is_better_than_a_false_one():
    confidences, right = sample()
    assert solver.solve(confidences, right, COSTS, Budget(mean=0.5)) is None
    assert solver.solve(confidences, right, COSTS, Budget(risk=0.001)) is None


def test_a_promise_of_risk_holds_on_other_images():
    """With doubt 0.1, at most about a tenth of the promises may fail; here they are of the same distribution."""
    confidences, right = sample(20_000, seed=9)
    broken = promised = 0
    for seed in range(60):
        chosen = np.random.default_rng(seed).choice(20_000, 300, replace=False)
        found = solver.solve(confidences[:, chosen], right[:, chosen], COSTS, Budget(risk=0.2, doubt=0.1))
        if found is not None:
            promised += 1
            broken += solver.plan(confidences, right, COSTS, found.thresholds).wrong > 0.2
    assert promised > 30
    assert broken <= 0.2 * promised


def test_binomial_tail():
    wanted = sum(math.comb(20, k) * 0.3**k * 0.7 ** (20 - k) for k in range(5))
    assert solver.binomial_tail(4, 20, 0.3) == pytest.approx(wanted)


@pytest.mark.parametrize(("coverage", "width", "inside"), [(0.8, 0.2, range(7, 11)), (0.5, 0.1, range(9, 11)),
                                                           (1.0, 0.3, range(6)), (0.0, 0.3, range(14, 20)),
                                                           (0.8, 1.0, range(20)), (0.8, 0.0, range(0))])  # fmt: skip
def test_a_window_holds_the_images_around_the_border(coverage, width, inside):
    confidence = np.random.default_rng(1).permutation(20) / 20
    low, high = solver.around(confidence, coverage, width)
    if coverage == 0.8 and 0 < width < 1:
        inside = range(2, 6)  # the border is below 16 of 20 images
    assert sorted(round(20 * c) for c in confidence if low <= c < high) == [*inside]


def oracle_linear(x, norm, weight, bias):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    x = [(v - mean) / math.sqrt(variance + 1e-5) * g + b for v, g, b in zip(x, *norm, strict=True)]
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def test_linear_head():
    head = LinearHead(4, 3, Readout(2, 1, (2, 2))).double().eval()
    torch.nn.init.normal_(head.norm.weight)
    x = torch.randn(2, 6, 4).double()
    for i in range(2):
        norm = head.norm.weight.tolist(), head.norm.bias.tolist()
        wanted = oracle_linear(x[i, 0].tolist(), norm, head.fc.weight.tolist(), head.fc.bias.tolist())
        assert head(x)[i].tolist() == pytest.approx(wanted)


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def normed(bn, c: int, x: float) -> float:
    scale = bn.weight[c].item() / math.sqrt(bn.running_var[c].item() + bn.eps)
    return (x - bn.running_mean[c].item()) * scale + bn.bias[c].item()


def oracle_perception(head: PerceptionHead, x: torch.Tensor, grid: tuple[int, int], wide: bool) -> list[float]:
    """x (N, C) of one image with a class token before the patches."""
    (h, w), (token, patches) = grid, (x[0].tolist(), x[1:].tolist())
    layers, c = [*head.convs], len(token)

    def mix(conv, pixels):
        weight, bias = conv.weight.flatten(1).tolist(), conv.bias.tolist()
        return [
            [sum(a * b for a, b in zip(row, p, strict=True)) + bias[o] for o, row in enumerate(weight)] for p in pixels
        ]

    y = [[normed(layers[2], k, gelu(v)) for k, v in enumerate(p)] for p in mix(layers[0], patches)]
    if wide:
        kernel, bias, z = layers[3].weight, layers[3].bias, []
        for i, j in itertools.product(range(h), range(w)):
            row = []
            for k in range(c):
                total = bias[k].item()
                for di, dj in itertools.product((-1, 0, 1), repeat=2):
                    if 0 <= i + di < h and 0 <= j + dj < w:
                        total += kernel[k, 0, di + 1, dj + 1].item() * y[(i + di) * w + j + dj][k]
                row.append(normed(layers[5], k, gelu(total)))
            z.append(row)
        y = z
    y = [[normed(layers[-1], k, v) for k, v in enumerate(p)] for p in mix(layers[-2], y)]
    features = [[a + b for a, b in zip(p, q, strict=True)] for p, q in zip(patches, y, strict=True)]
    pooled = [sum(p[k] for p in features) / len(features) + token[k] for k in range(c)]
    weight, bias = head.fc.weight.tolist(), head.fc.bias.tolist()
    return [sum(a * b for a, b in zip(row, pooled, strict=True)) + bias[o] for o, row in enumerate(weight)]


@pytest.mark.parametrize("wide", [True, False])
def test_perception_head(wide):
    head = PerceptionHead(4, 3, Readout(1, 1, (2, 3)), wide).double().eval()
    for part in head.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 7, 4).double()
    for i in range(2):
        assert head(x)[i].tolist() == pytest.approx(oracle_perception(head, x[i], (2, 3), wide))


@torch.no_grad()
def oracle_aggregation(head: AggregationHead, x: torch.Tensor, grid: tuple[int, int]) -> list[float]:
    token, patches, c = x[0].tolist(), x[1:], x.shape[1]
    chosen = [i * grid[1] + j for i in range(0, grid[0], head.stride) for j in range(0, grid[1], head.stride)]
    size, weight = c // head.num_heads, head.qkv.weight
    mixed = torch.zeros(len(chosen), c, dtype=torch.float64)
    for n in range(head.num_heads):
        part = slice(n * size, (n + 1) * size)
        q, k, v = ([weight[j * c :][part] @ patches[m] for m in chosen] for j in range(3))
        for a in range(len(chosen)):
            scores = [math.exp(float(q[a] @ k[b]) / math.sqrt(size)) for b in range(len(chosen))]
            mixed[a, part] = sum(s / sum(scores) * each for s, each in zip(scores, v, strict=True))
    out = [(head.proj.weight @ row + head.proj.bias).tolist() for row in mixed]
    pooled = [sum(row[k] for row in out) / len(out) + token[k] for k in range(c)]
    weight, bias = head.fc.weight.tolist(), head.fc.bias.tolist()
    return [sum(a * b for a, b in zip(row, pooled, strict=True)) + bias[o] for o, row in enumerate(weight)]


@pytest.mark.parametrize("stride", [2, 3])
def test_aggregation_head(stride):
    head = AggregationHead(6, 3, Readout(1, 1, (3, 4)), stride, num_heads=2).double().eval()
    x = torch.randn(2, 13, 6).double()
    for i in range(2):
        assert head(x)[i].tolist() == pytest.approx(oracle_aggregation(head, x[i], (3, 4)))


def test_heads_of_windows_take_their_grid_from_the_tokens():
    head = PerceptionHead(4, 3, Readout(0, 0), True).double().eval()
    flat = PerceptionHead(4, 3, Readout(0, 0, (2, 3)), True).double().eval()
    flat.load_state_dict(head.state_dict())
    x = torch.randn(2, 2, 3, 4).double()
    assert torch.equal(head(x), flat(x.flatten(1, 2)))


def test_confidences():
    logits, other = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    for i in range(3):
        powers = [math.exp(v) for v in logits[i].tolist()]
        assert top_probability(logits)[i].item() == pytest.approx(max(powers) / sum(powers))
        a, b = logits[i].tolist(), other[i].tolist()
        norms = math.sqrt(sum(v * v for v in a) * sum(v * v for v in b))
        assert similarity(logits, other)[i].item() == pytest.approx(
            sum(p * q for p, q in zip(a, b, strict=True)) / norms
        )


class TestFaultsShow:
    """The comparisons above, on versions with a fault."""

    def test_an_exit_taken_on_the_wrong_side(self):
        confidences, right = sample()
        wrong = solver.plan(-confidences, right, COSTS, [-0.5, -0.5])
        assert wrong.cost != pytest.approx(oracle_plan(confidences, right, COSTS, [0.5, 0.5])[1])

    def test_thresholds_that_forget_who_has_left(self):
        confidences, _ = sample()
        wanted = solver.shares(1.0, 3)
        forgetful = [
            np.sort(each)[::-1][math.floor(60 * share) - 1] for each, share in zip(confidences, wanted, strict=False)
        ]
        assert forgetful != pytest.approx(oracle_thresholds(confidences.tolist(), wanted.tolist()))

    def test_a_head_without_its_residual(self):
        head = PerceptionHead(4, 3, Readout(1, 1, (2, 3)), True).double().eval()
        x = torch.randn(1, 7, 4).double()
        token, patches = head.readout.split(x)
        without = head.fc(head.convs(patches.mT.unflatten(2, (2, 3))).flatten(2).mT.mean(1) + token)
        assert without[0].tolist() != pytest.approx(oracle_perception(head, x[0], (2, 3), True))

    def test_attention_with_another_scale(self):
        head = AggregationHead(6, 3, Readout(1, 1, (3, 4)), 2, num_heads=2).double().eval()
        x = torch.randn(1, 13, 6).double()
        wanted = oracle_aggregation(head, x[0], (3, 4))
        head.qkv.weight.data[:6] *= math.sqrt(2)  # q
        assert head(x)[0].tolist() != pytest.approx(wanted)
