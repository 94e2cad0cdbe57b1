"""Semantic tokens: blocks that run on a few centres of the patches, which two of them have gathered by attention.

`install_semantic_` makes the first block of a run do the work of all, as other runs do that leave blocks fewer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from martlet.vit.parts import before, linear, mlp, project, residual, take_over_, through
from martlet.vit.token_run import Patches
from martlet.vit.view import AttentionView, BlockView

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class SemanticRun:
    """Runs blocks one after the other, from tokens (B, N, C) to tokens.

    grid: semantic tokens (down, across). They begin as means of cells of the grid of patches. In the first block they
    and the prefix attend to prefix and patches, in the second to themselves as well, in later ones to each other, each
    counted as many times as it stands for patches.
    num_read: the last block computes only so many leading tokens; None for all, and each patch takes the value of its
    cell. recover: the last block's queries are the patches, as they were before the first block, and its keys and
    values what became of the semantic tokens.
    Source: Chang et al., Making Vision Transformers Efficient from A Token Sparsification View, 2023, arXiv 2303.08685,
    section 3.
    """

    blocks: tuple[BlockView, ...]
    patches: Patches
    grid: Grid
    num_read: int | None = None
    recover: bool = False

    def __call__(self, x: Tensor, *others: object, **more: object) -> Tensor:
        first, cells = self.patches.first, self.grid[0] * self.grid[1]
        count = first + cells
        pool = self._cells().to(x)  # (S, P)
        patches = x[:, first:]
        few = (pool / pool.sum(1, keepdim=True)) @ patches  # (B, S, C)
        size = torch.cat([torch.ones(first), self._cells().sum(1)]).log().to(x)  # (prefix + S)
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            if i == 0:
                y = _attended(block, torch.cat([few, x], 1), count, cells)
                few = torch.cat([y[:, cells:], y[:, :cells]], 1)  # the prefix first
            elif last and self.recover:
                y = _attended(block, torch.cat([patches, few], 1), patches.shape[1] + first, patches.shape[1], size)
                y = torch.cat([y[:, patches.shape[1] :], y[:, : patches.shape[1]]], 1)
                return mlp(block, y)
            elif i == 1:
                few = _attended(block, torch.cat([few, patches], 1), count, 0)
            else:
                few = _attended(block, few, self.num_read or count if last else count, 0, size)
            few = mlp(block, few[:, : self.num_read] if last else few)
        if self.num_read:
            return few
        return torch.cat([few[:, :first], pool.mT @ few[:, first:]], 1)

    def _cells(self) -> Tensor:
        """(S, P), 1 where a patch is in a cell. Cells are as equal as the grid allows."""
        assert self.patches.grid is not None
        down, across = ([i * m // n for i in range(n)] for n, m in zip(self.patches.grid, self.grid, strict=True))
        of = torch.tensor([i * self.grid[1] + j for i in down for j in across])
        return (of == torch.arange(self.grid[0] * self.grid[1])[:, None]).float()


def _attended(block: BlockView, x: Tensor, queries: int, first_key: int, size: Tensor | None = None) -> Tensor:
    """The leading tokens of x (B, N, C), and what attention to all from `first_key` on adds to them.

    size: the logarithm of how many patches each of these stands for; None if one.
    """
    return x[:, :queries] + residual(
        block, block.attention.module(before(block, x), queries, first_key, size), first=True
    )


@dataclass(frozen=True, eq=False)
class _Attend:
    """Attention of the leading tokens of x (B, N, C) to those from another on, from one product for both."""

    attention: AttentionView

    def __call__(self, x: Tensor, queries: int, first_key: int, size: Tensor | None) -> Tensor:
        attention = self.attention
        query, key, value = project(attention, x).heads
        out = functional.scaled_dot_product_attention(
            through(attention.query_norm, query[:, :, :queries]),
            through(attention.key_norm, key[:, :, first_key:]),
            value[:, :, first_key:],
            attn_mask=None if size is None else size[None, None, None],
            scale=attention.scale,
        )
        return linear(attention.proj, through(attention.norm, out.transpose(1, 2).flatten(2)))


def install_semantic_(run: SemanticRun) -> None:
    """Makes the first block of the run do the work of all."""
    take_over_(run.blocks, run, _Attend)
