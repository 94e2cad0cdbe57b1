"""A vision transformer as an ensemble of paths: what each attention and each MLP adds to the tokens, and what the
first block gets. All of them reach the norm before the head directly, and later paths as their input."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from martlet.vit.parts import before, residual, take_over_
from martlet.vit.structure import put_
from martlet.vit.token_run import Attend
from martlet.vit.view import BlockView, VitView

SCALE = "path_scale"
"""The name, in the first block, of the weights of the paths that are left, what the first block gets first."""


class Path(NamedTuple):
    """What one part of a block adds: `attention`, or `mlp`, of the tokens that the attention was added to."""

    block: int
    part: str


def paths_of(depth: int) -> list[Path]:
    """All of so many blocks, in the order in which they are computed."""
    return [Path(i, part) for i in range(depth) for part in ("attention", "mlp")]


@dataclass(frozen=True, eq=False)
class PathRun:
    """Runs blocks as paths, from tokens (B, N, C) to tokens.

    cut: paths that add nothing and aren't computed. What else a block is called with isn't used.
    """

    blocks: tuple[BlockView, ...]
    cut: frozenset[Path] = frozenset()

    def __call__(self, x: Tensor, *others: object, **more: object) -> Tensor:
        scale = getattr(self.blocks[0].module, SCALE, None)
        if scale is None:
            return self.outputs(x)[1]
        total = x * scale[0]
        for i, y in enumerate(self.outputs(x)[0], 1):
            total = total + y * scale[i]
        return total

    def outputs(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """What each path that is left adds, and the sum of these and x; all (B, N, C)."""
        found = []
        for path in paths_of(len(self.blocks)):
            if path not in self.cut:
                found.append(_added(self.blocks[path.block], x, path.part == "attention"))
                x = x + found[-1]
        return found, x


def _added(block: BlockView, x: Tensor, first: bool) -> Tensor:
    inside = before(block, x, first)
    out = block.attention.module(inside)[0] if first else block.mlp.module(inside)
    return residual(block, out, first)


def run_as_paths_(vit: VitView, cut: Collection[Path] = (), scaled: bool = False) -> PathRun:
    """Makes the first block run all that is left, and takes out the modules of what is cut. The view is stale then.

    scaled: gives the paths weights, of 1.
    """
    run = PathRun(vit.blocks, frozenset(cut))
    take_over_(vit.blocks, run, Attend)
    for path in run.cut:
        block = vit.blocks[path.block]
        gone = (block.attention, block.norm1) if path.part == "attention" else (block.mlp, block.norm2)
        for part in gone:
            put_(vit.root, part.name, nn.Identity())
    if scaled:
        like = cast(nn.Module, vit.blocks[0].module)
        size = 1 + 2 * len(vit.blocks) - len(run.cut)
        weight = vit.heads[0].weight if vit.heads else vit.blocks[0].mlp.fc2.weight
        like.register_parameter(SCALE, nn.Parameter(torch.ones(size, dtype=weight.dtype, device=weight.device)))
    return run


def restart(run: PathRun, cut: Collection[Path]) -> PathRun:
    """Another run of the same blocks, in the place of the one that was installed."""
    other = PathRun(run.blocks, frozenset(cut))
    run.blocks[0].module.forward = other
    return other


def tokens_before(run: PathRun, module: nn.Module, images: Iterator[Tensor]) -> Iterator[Tensor]:
    """What the first block gets, by batch."""
    for batch in images:
        found: list[Tensor] = []

        def hook(_module: nn.Module, args: tuple[Tensor, ...], found: list[Tensor] = found) -> None:
            found.append(args[0])

        handle = run.blocks[0].module.register_forward_pre_hook(hook)
        try:
            module(batch)
        finally:
            handle.remove()
        yield found[0]
