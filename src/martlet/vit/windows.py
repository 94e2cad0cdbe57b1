"""Windows of which a block computes some: the mechanism under techniques that prune windows.

`install_windows_` makes the first block of a stage that leaves windows out run the later ones of that stage, and these
pass on what they get: which windows tell most is found once a stage, and is a local variable and no state of the model.
Modules, names and the view stay.

Where tokens stand in windows, padding and shifts included, is one table of numbers. So to get the windows that are
kept is one lookup, and to put them back is one write, however a library pads and shifts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.vit.parts import before, linear, mlp, project, residual, through
from martlet.vit.reading import logits_of_noise
from martlet.vit.view import AttentionView, BlockView, VitView, Window

MASKED = -100.0
"""What is added to scores between tokens that a shift brought together, in every library."""


class Layout(NamedTuple):
    """Which token stands where in which window.

    places: (W, N), numbers of tokens in row order; H W is padding. regions: (W, N); tokens of different ones were
    brought together by the shift, and don't see each other; None without a shift.
    """

    places: Tensor
    regions: Tensor | None
    padded: bool


def layout(window: Window, grid: tuple[int, int]) -> Layout:
    """Where the tokens of a grid (H, W) stand."""
    size = window.size
    full = [-(-side // w) * w for side, w in zip(grid, size, strict=True)]
    shift = [0 if w >= side else s for side, w, s in zip(full, size, window.shift, strict=True)]
    count = grid[0] * grid[1]
    numbers = torch.arange(count).view(grid)
    back = (-shift[0], -shift[1])
    if window.shifts_first:
        numbers = numbers.roll(back, (0, 1))
    numbers = functional.pad(numbers, (0, full[1] - grid[1], 0, full[0] - grid[0]), value=count)
    if not window.shifts_first:
        numbers = numbers.roll(back, (0, 1))
    down, across = (
        torch.tensor([(i >= n - w) + (i >= n - s) if s else 0 for i in range(n)])
        for n, w, s in zip(full, size, shift, strict=True)
    )
    regions = _windows(3 * down[:, None] + across, size) if any(shift) else None
    return Layout(_windows(numbers, size), regions, full != [*grid])


def _windows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W) -> (windows, tokens of each in row order)."""
    height, width = x.shape
    x = x.view(height // size[0], size[0], width // size[1], size[1])
    return x.transpose(1, 2).reshape(-1, size[0] * size[1])


@dataclass(frozen=True, eq=False)
class WindowRun:
    """Runs blocks of one stage, from a grid of tokens to one: (B, H, W, C), or (B, H W, C) as Hugging Face has it.

    kept: how many windows each block computes; None computes all, by the block itself. The windows that a block leaves
    out pass it unchanged. Kept are those of the greatest L2 norm before the first of these blocks.
    Source: Chen et al., SparseViT, 2023, arXiv 2303.17605, section 3.
    """

    blocks: tuple[BlockView, ...]
    kept: tuple[int | None, ...]

    def __call__(self, x: Tensor, *others: tuple[int, int], **more: object) -> Tensor | tuple[Tensor, None]:
        grid = _grid(x, *others)
        shape, x = x.shape, x.reshape(x.shape[0], -1, x.shape[-1])  # (B, L, C)
        magnitude = x.square().sum(-1)  # (B, L)
        ranking: dict[tuple[int, int], Tensor] = {}
        for block, kept in zip(self.blocks, self.kept, strict=True):
            if kept is None:
                y = type(block.module).forward(block.module, x.view(shape), *others, **more)
                x = (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
                continue
            window = block.attention.window
            assert window is not None
            at = layout(window, grid)
            if window.shift not in ranking:
                ranking[window.shift] = _rank(magnitude, at, max(k for k in self.kept if k))
            x = _compute(block, x, at, ranking[window.shift][:, :kept])
        return _given(x.view(shape))


def _rank(magnitude: Tensor, at: Layout, most: int) -> Tensor:
    """The windows (B, most) of the greatest magnitude, the greatest first; of each token (B, L), squared."""
    if at.padded:
        magnitude = functional.pad(magnitude, (0, 1))  # padding has none
    places = at.places.to(magnitude.device)
    by_window = magnitude.index_select(1, places.flatten()).unflatten(1, places.shape).sum(-1)  # (B, W)
    return by_window.topk(most).indices


def _compute(block: BlockView, x: Tensor, at: Layout, chosen: Tensor) -> Tensor:
    """x (B, L, C), in which the chosen windows (B, K) went through the block."""
    batch, count, width = x.shape
    if at.padded:
        x = functional.pad(x, (0, 0, 0, 1))  # one more token stands for all padding
    rows = x.flatten(0, 1)
    places = at.places.to(x.device)[chosen].flatten(0, 1)  # (B K, N)
    first = torch.arange(batch, device=x.device) * x.shape[1]
    index = (places.unflatten(0, chosen.shape) + first[:, None, None]).flatten()
    windows = rows.index_select(0, index).view(*places.shape, width)  # (B K, N, C)
    normed = before(block, windows)
    if at.padded:  # it is zero after the norm
        normed = normed * (places < count).to(x.dtype)[..., None]
    mask = None
    if at.regions is not None:
        regions = at.regions.to(x.device)[chosen].flatten(0, 1)  # (B K, N)
        mask = (regions[:, None] != regions[..., None]).to(x.dtype) * MASKED  # (B K, N, N)
    windows = windows + residual(block, block.attention.module(normed, mask), first=True)
    rows = rows.index_put((index,), mlp(block, windows).flatten(0, 1))
    return rows.view(x.shape)[:, :count]


@dataclass(frozen=True, eq=False)
class _Attend:
    """Attention inside windows (B, N, C), with what is added to the scores of each window (B, N, N)."""

    attention: AttentionView

    def __call__(self, x: Tensor, mask: Tensor | None) -> Tensor:
        attention = self.attention
        assert attention.window is not None
        bias = attention.window.position_bias()[None]  # (1, H, N, N)
        query, key, value = project(attention, x).heads
        query, key = through(attention.query_norm, query), through(attention.key_norm, key)
        out = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias if mask is None else bias + mask[:, None],
            scale=attention.scale,
        )
        return linear(attention.proj, through(attention.norm, out.transpose(1, 2).flatten(2)))


def _grid(x: Tensor, *others: tuple[int, int]) -> tuple[int, int]:
    """Of what a block is called with."""
    return (x.shape[1], x.shape[2]) if x.ndim == 4 else others[0]


def _given(x: Tensor) -> Tensor | tuple[Tensor, None]:
    """As the library's blocks give it: Hugging Face's have attention weights beside it, which nobody asks for."""
    return x if x.ndim == 4 else (x, None)


def _pass(x: Tensor, *others: object, **more: object) -> Tensor | tuple[Tensor, None]:
    """The forward of a block that an earlier one has run."""
    return _given(x)


def install_windows_(blocks: Sequence[BlockView], kept: Mapping[int, int]) -> None:
    """Makes blocks compute some of their windows, and the others all. kept: how many, by block."""
    for block in blocks:
        for module in (block.module, block.attention.module):
            module.__dict__.pop("forward", None)  # what was installed before
    for stage in sorted({blocks[i].stage for i in kept}):
        mine = [i for i, block in enumerate(blocks) if block.stage == stage]
        mine = mine[mine.index(min(i for i in mine if i in kept)) :]
        run = WindowRun(tuple(blocks[i] for i in mine), tuple(kept.get(i) for i in mine))
        run.blocks[0].module.forward = run
        for block in run.blocks[1:]:
            block.module.forward = _pass
        for i in mine:
            if i in kept:
                attention = blocks[i].attention
                attention.module.forward = _Attend(attention)


def num_windows(model: Model, vit: VitView, technique: str) -> list[int]:
    """How many windows each block has, padding included, for the size of the model's images.

    Raises:
        RecipeError: attention is global.
    """
    grids: list[tuple[int, int]] = []
    handles = []
    for block in vit.blocks:
        if block.attention.window is None:
            raise RecipeError(
                f"{technique} leaves out windows, and attention at {block.name} is global; it takes Swin. tome takes "
                "models with global attention"
            )
        handles.append(block.module.register_forward_pre_hook(lambda _, args: grids.append(_grid(*args))))
    try:
        logits_of_noise(model)
    finally:
        for handle in handles:
            handle.remove()
    windows = [block.attention.window for block in vit.blocks]
    return [len(layout(window, grid).places) for window, grid in zip(windows, grids, strict=True) if window]
