"""Blocks of a weight matrix, and which of them to make zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def block_sums(x: Tensor, size: int) -> Tensor:
    """Of x (O, I) the sums over blocks of size × size, (O / size, I / size)."""
    return x.unflatten(1, (-1, size)).unflatten(0, (-1, size)).sum((1, 3))


def spread_blocks(blocks: Tensor, size: int) -> Tensor:
    """Each number (P, Q) in the place of its block, (P size, Q size)."""
    return blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)


def power_weight(losses: Sequence[Tensor], powers: Sequence[float]) -> float:
    """How much a unit of power counts in loss: the mean over layers of the steepest rise of loss, over that of power.

    losses: by layer, of each block. powers: by layer, of a block.
    Source: the official code of Xu et al., LPViT, 2024, arXiv 2407.02068, where it is called beta.
    """
    steepest = sum(float(loss.max()) for loss in losses) / len(losses)
    return steepest / (sum(powers) / len(powers))


def choose_blocks(
    losses: Sequence[Tensor],
    macs: Sequence[float],
    powers: Sequence[float],
    power_weight: float,
    macs_to_remove: float,
    least: float,
) -> list[Tensor]:
    """Which blocks stay, True or False by layer: those go whose loss, less what they save in power, is least for each
    MAC, until so many MACs are gone.

    losses: by layer (P, Q). macs, powers: by layer, of one block. least: the share of blocks that stays in every layer.
    Fewer go where `least` ends it.
    """
    prices = [(loss - power_weight * p) / m for loss, m, p in zip(losses, macs, powers, strict=True)]
    order = torch.cat([price.flatten() for price in prices]).argsort(stable=True).tolist()
    layer_of = [i for i, price in enumerate(prices) for _ in range(price.numel())]
    starts = [0]
    for price in prices:
        starts.append(starts[-1] + price.numel())
    room = [int((1 - least) * price.numel()) for price in prices]
    stay = [torch.ones(price.numel(), dtype=torch.bool) for price in prices]
    gone = 0.0
    for number in order:
        layer = layer_of[number]
        if gone >= macs_to_remove:
            break
        if room[layer]:
            room[layer] -= 1
            stay[layer][number - starts[layer]] = False
            gone += macs[layer]
    return [each.view(price.shape) for each, price in zip(stay, prices, strict=True)]
