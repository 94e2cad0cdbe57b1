"""Which token each patch of an image has become part of, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from martlet.core.model import Model
from martlet.vit.token_run import Reduced, TokenRun
from martlet.vit.view import view


class Groups(NamedTuple):
    """What a block that reduces tokens has left of the patches (down, across) of some images.

    of: (B, H W), the number of the token that most of each patch went to, in row order; -1 for one that was dropped.
    num_tokens: how many tokens are left, class token and the like not counted.
    """

    block: str
    num_tokens: int
    grid: tuple[int, int]
    of: Tensor


def groups(model: Model, images: Tensor) -> list[Groups]:
    """After each block that reduces tokens of the images (B, 3, H, W), in order; none if no block does.

    The model is run as it is, before any engine has it. One whose patches have no places gives none.
    """
    twin = model.copy()
    blocks = view(twin.module).blocks
    run = next((b.module.forward for b in blocks if isinstance(b.module.forward, TokenRun)), None)
    if run is None or run.patches.grid is None:
        return []
    found: list[Groups] = []

    def follow(x: Tensor, *others: object, **more: object) -> Tensor:
        _, _, made = run.reduced(x)
        found.extend(_groups(run, done, x) for done in made)
        return run(x)

    run.blocks[0].module.forward = follow
    with torch.inference_mode():
        twin.module(images)
    return found


def _groups(run: TokenRun, done: Sequence[Reduced], x: Tensor) -> Groups:
    """What has become of each token is seen by giving back, in the place of each that is left, its number."""
    first, grid, last = run.patches.first, run.patches.grid, done[-1]
    assert grid is not None
    shares = torch.eye(last.num_tokens, dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)  # (B, M, M)
    for reduced in reversed(done):
        shares = reduced.spread(shares)  # (B, N, M)
    of = shares[:, first:].argmax(-1) - first  # (B, H W)
    dropped = shares[:, first:].sum(-1) < 0.5  # nothing of it is given back
    return Groups(last.block.name, last.num_tokens - first, grid, of.masked_fill(dropped, -1))
