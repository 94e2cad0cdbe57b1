"""Groups of tokens against the papers' words in plain loops, in float64."""

import math

import pytest
import torch
from torch import Tensor

from martlet.functional.tokens import (
    Reduction,
    bipartite_soft_matching,
    cosine_similarity,
    fuse_rest,
    merge,
    unmerge,
)


def scores_of(b: int, s: int, d: int) -> Tensor:
    return torch.randn(b, s, d, dtype=torch.float64)


def matching_oracle(scores: list[list[float]], r: int, sources, destinations, n: int, handicap) -> list[set[int]]:
    """The groups as sets of tokens, whatever their order: each source draws an edge, the r strongest are kept."""
    edges = []
    for i, source in enumerate(sources):
        j = max(range(len(destinations)), key=lambda j: scores[i][j])
        edges.append((scores[i][j] - handicap[i], source, destinations[j]))
    edges.sort(reverse=True)
    group = {token: {token} for token in range(n)}
    for _, source, destination in edges[:r]:
        group[destination] |= group.pop(source)
    return sorted(group.values(), key=min)


def members(reduction: Reduction, image: int) -> list[list[tuple[int, float]]]:
    """The tokens, with their shares, of each one that is left, in its order."""
    rows = reduction.shares[image].tolist()
    return [[(reduction.order[n], share) for n, share in enumerate(row) if share] for row in rows]


def as_sets(reduction: Reduction, image: int = 0) -> list[set[int]]:
    """Which tokens each one that is left is made of."""
    assert set(reduction.shares[image].flatten().tolist()) <= {0.0, 1.0}
    return sorted(({token for token, _ in made} for made in members(reduction, image)), key=min)


SHAPES = [(9, 1, 3), (9, 1, 0), (8, 0, 4), (14, 3, 5), (3, 1, 1)]
"""Tokens, prefix, r: odd and even, with and without class token and registers, up to as many as can go."""


@pytest.mark.parametrize(("n", "prefix", "r"), SHAPES)
@pytest.mark.parametrize("penalized", [False, True])
def test_matching_is_the_papers(n: int, prefix: int, r: int, penalized: bool) -> None:
    sources = [t for t in range(prefix, n) if t % 2 == 0]
    destinations = [t for t in range(prefix, n) if t % 2 == 1]
    scores = scores_of(4, len(destinations), len(sources))
    handicap = torch.rand(4, len(sources), dtype=torch.float64) * 2 if penalized else None
    reduction = bipartite_soft_matching(scores, r, prefix, destinations, sources, handicap)
    assert reduction.num_tokens == n - r
    for i in range(4):
        subtracted = [0.0] * len(sources) if handicap is None else handicap[i].tolist()
        assert as_sets(reduction, i) == matching_oracle(scores[i].T.tolist(), r, sources, destinations, n, subtracted)


def test_the_matching_test_can_fail() -> None:
    """Weakest edges first, or edges to the least alike, are other groups."""
    sources, destinations = [2, 4, 6, 8], [1, 3, 5, 7]
    scores = scores_of(1, 4, 4)
    expected = matching_oracle(scores[0].T.tolist(), 2, sources, destinations, 9, [0.0] * 4)
    assert as_sets(bipartite_soft_matching(scores, 2, 1, destinations, sources)) == expected
    assert as_sets(bipartite_soft_matching(-scores, 2, 1, destinations, sources)) != expected
    reversed_order = 10 * scores.amax(1)  # the handicap turns the order of edges round
    assert as_sets(bipartite_soft_matching(scores, 2, 1, destinations, sources, reversed_order)) != expected


def test_ties_are_shared_and_lose_nothing() -> None:
    reduction = bipartite_soft_matching(torch.ones(2, 3, 4), 2, 1, [1, 2, 3], [4, 5, 6, 7])
    torch.testing.assert_close(reduction.shares.sum(1), torch.ones(2, 8))
    joins = reduction.shares[:, 1:4, 4:]  # (B, D, S)
    torch.testing.assert_close(joins.sum((1, 2)), torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(joins.flatten().unique(), torch.tensor([0.0, 1 / 3]))


def test_similarity_is_the_cosine() -> None:
    a, b = scores_of(2, 3, 5), scores_of(2, 4, 5)
    found = cosine_similarity(a, b)
    for n in range(2):
        for i in range(3):
            for j in range(4):
                dot = sum(float(x * y) for x, y in zip(a[n, i], b[n, j], strict=True))
                length = math.sqrt(sum(float(x) ** 2 for x in a[n, i]) * sum(float(y) ** 2 for y in b[n, j]))
                assert float(found[n, i, j]) == pytest.approx(dot / length, abs=1e-12)


def matching(n: int, prefix: int, r: int, batch: int = 2) -> Reduction:
    sources = [t for t in range(prefix, n) if t % 2 == 0]
    destinations = [t for t in range(prefix, n) if t % 2 == 1]
    return bipartite_soft_matching(scores_of(batch, len(destinations), len(sources)), r, prefix, destinations, sources)


REDUCTIONS = {
    "matched": matching(9, 1, 3),
    "all matched": matching(8, 2, 3),
    "fused": fuse_rest(torch.rand(2, 7, dtype=torch.float64), 3, 2),
    "shared": bipartite_soft_matching(torch.ones(2, 3, 4, dtype=torch.float64), 2, 1, [2, 4, 6], [1, 3, 5, 7]),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_merge_is_the_weighted_mean_and_unmerge_gives_it_back(name: str) -> None:
    reduction = REDUCTIONS[name]
    n = len(reduction.order)
    x, weights = scores_of(2, n, 3), torch.rand(2, n, dtype=torch.float64) + 0.1
    (merged, size), (plain, _) = merge(x, reduction, weights), merge(x, reduction)
    restored = unmerge(merged, reduction)
    assert merged.shape == (2, reduction.num_tokens, 3)
    for i in range(2):
        shares: list[list[tuple[int, float]]] = [[] for _ in range(n)]
        for m, made in enumerate(members(reduction, i)):
            weight = sum(share * float(weights[i, t]) for t, share in made)
            assert float(size[i, m]) == pytest.approx(weight)
            for c in range(3):
                mean = sum(share * float(weights[i, t] * x[i, t, c]) for t, share in made) / weight
                assert float(merged[i, m, c]) == pytest.approx(mean, abs=1e-12)
                mean = sum(share * float(x[i, t, c]) for t, share in made) / sum(share for _, share in made)
                assert float(plain[i, m, c]) == pytest.approx(mean, abs=1e-12)
            for t, share in made:
                shares[t].append((m, share))
        for t in range(n):
            for c in range(3):
                value = sum(share * float(merged[i, m, c]) for m, share in shares[t])
                assert float(restored[i, t, c]) == pytest.approx(value, abs=1e-12)
    assert not torch.allclose(merged, plain)  # the comparison sees weights


def test_two_reductions_with_sizes_are_one_mean() -> None:
    x = scores_of(2, 8, 3)
    first, second = matching(8, 0, 3), matching(5, 0, 2)
    y, size = merge(x, first)
    twice, total = merge(y, second, size)
    torch.testing.assert_close((twice * total[..., None]).sum(1), x.sum(1))
    torch.testing.assert_close(total.sum(1), torch.full((2,), 8.0, dtype=torch.float64))
    without, _ = merge(y, second)
    assert not torch.allclose((without * total[..., None]).sum(1), x.sum(1))  # sizes matter


@pytest.mark.parametrize(("n", "prefix", "keep"), [(8, 1, 3), (7, 2, 4), (6, 1, 0)])
def test_the_rest_is_fused(n: int, prefix: int, keep: int) -> None:
    scores = torch.rand(3, n, dtype=torch.float64)
    reduction = fuse_rest(scores[:, prefix:], keep, prefix)
    for i in range(3):
        ranked = sorted(range(prefix, n), key=lambda t: -float(scores[i, t]))
        alone = [*range(prefix)], ranked[:keep]
        expected = [[t] for t in alone[0]] + [sorted(ranked[keep:])] + [[t] for t in alone[1]]
        assert [sorted(t for t, _ in made) for made in members(reduction, i)] == expected
