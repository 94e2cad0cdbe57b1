"""Tokens on a grid to clusters on a coarser one, and back, by distances of features alone.

Who may join whom, and where clusters begin, are constants of the two grids; so shapes are static, and each step is a
few products.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from martlet.functional.tokens import product

Grid = tuple[int, int]
"""Down, across."""

EMPTY = 1e-12
"""The share of its own part that a cluster keeps, so that one that no token joins is the mean of its part."""


def cluster(
    x: Float[Tensor, "b n c"], grid: Grid, clusters: Grid, iterations: int, temperature: float, reach: int
) -> Float[Tensor, "b m n"]:
    """How much of each token of a grid goes to each of h w clusters; over these it adds up to 1.

    Clusters begin as the means of the tokens in their part of the grid. In each iteration a token is shared among the
    clusters around its own, by a softmax of squared distances over the temperature, and clusters become the means of
    their shares. The shares of the last iteration are given.
    Source: Liang et al., Expediting Large-Scale Vision Transformer, 2022, arXiv 2210.01035, section 3.2, token
    clustering layer.
    """
    parts = means_of_parts(grid, clusters).to(x).expand(x.shape[0], -1, -1)  # (B, M, N)
    barred = torch.where(near(grid, clusters, reach), 0.0, -torch.inf).to(x)  # (M, N)
    shares = parts
    for _ in range(iterations):
        centroids = product(shares, x) / shares.sum(-1, keepdim=True)  # (B, M, C)
        shares = (_likeness(centroids, x) / temperature + barred).softmax(1) + EMPTY * parts
    return shares


def reconstruct(
    x: Float[Tensor, "b n c"], centroids: Float[Tensor, "b m c"], temperature: float, neighbours: int
) -> Float[Tensor, "b n m"]:
    """What each token takes from each cluster: a softmax of squared distances over the temperature, among its nearest.

    A token takes as much of what became of the clusters as it resembled them before.
    Source: Liang et al., 2022, arXiv 2210.01035, section 3.2, token reconstruction layer.
    """
    likeness = _likeness(centroids, x).mT / temperature  # (B, N, M)
    least = likeness.topk(min(neighbours, likeness.shape[-1])).values[..., -1:]  # (B, N, 1)
    return likeness.masked_fill(likeness < least, -torch.inf).softmax(-1)


def means_of_parts(grid: Grid, clusters: Grid) -> Float[Tensor, "m n"]:
    """Adaptive average pooling as a matrix: row i of h covers rows floor(i H / h) to ceil((i + 1) H / h)."""
    by_side = []
    for size, count in zip(grid, clusters, strict=True):
        i, at = torch.arange(count)[:, None], torch.arange(size)
        inside = (at >= i * size // count) & (at < -(-(i + 1) * size // count))  # (h, H)
        by_side.append(inside / inside.sum(1, keepdim=True))
    return torch.kron(*by_side)


def near(grid: Grid, clusters: Grid, reach: int) -> Bool[Tensor, "m n"]:
    """Whether a cluster is at most `reach` clusters, down and across, from the one in whose part the token stands."""
    by_side = []
    for size, count in zip(grid, clusters, strict=True):
        own = torch.arange(size) * count // size  # (H)
        by_side.append((own - torch.arange(count)[:, None]).abs() <= reach)  # (h, H)
    return torch.kron(by_side[0].int(), by_side[1].int()).bool()


def _likeness(centroids: Float[Tensor, "b m c"], x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m n"]:
    """Minus the squared distance, but for the token's own square, which no softmax over clusters sees."""
    return 2 * product(centroids, x.mT) - centroids.square().sum(-1, keepdim=True)
