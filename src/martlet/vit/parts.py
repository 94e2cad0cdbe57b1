"""Blocks run part by part: what norms, attention, scales and Linears of a view do to tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from martlet.vit.view import AttentionView, BlockView, LinearView, Part


def before(block: BlockView, x: Tensor, first: bool = True) -> Tensor:
    """What attention (first) or the MLP gets of x."""
    norm = block.norm1 if first else block.norm2
    return x if block.post_norm else norm.module(x)


def residual(block: BlockView, y: Tensor, first: bool) -> Tensor:
    """What is added to x of what attention (first) or the MLP gave."""
    norm = block.norm1 if first else block.norm2
    y = norm.module(y) if block.post_norm else y
    y = through(block.layer_scale1 if first else block.layer_scale2, y)
    return through(block.drop_path1 if first else block.drop_path2, y)


def mlp(block: BlockView, x: Tensor) -> Tensor:
    """x with what the block's MLP adds to it."""
    return x + residual(block, block.mlp.module(before(block, x, first=False)), first=False)


def through(part: Part | None, x: Tensor) -> Tensor:
    return x if part is None else part.module(x)


def project(attention: AttentionView, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, (B, N, H D) each, from one Linear or three."""
    maps = (attention.query, attention.key, attention.value)
    if not attention.is_fused:
        query, key, value = (linear(each, x) for each in maps)
        return query, key, value
    order = sorted(range(3), key=lambda i: maps[i].rows.start)
    parts = linear(maps[0], x).split([maps[i].rows.stop - maps[i].rows.start for i in order], -1)
    query, key, value = (parts[order.index(i)] for i in range(3))
    return query, key, value


def linear(map_: LinearView, x: Tensor) -> Tensor:
    """All rows of the Linear that a map is part of."""
    if map_.weight_name == "weight":  # of a Linear, whole or thin, that has a forward of its own
        return map_.module(x)
    return functional.linear(x, getattr(map_.module, map_.weight_name), getattr(map_.module, map_.bias_name))


def split_heads(attention: AttentionView, y: Tensor) -> Tensor:
    """(B, N, H D) -> (B, H, N, D), for q and k as for v."""
    return y.unflatten(-1, (attention.num_heads, y.shape[-1] // attention.num_heads)).transpose(1, 2)


def take_over_(
    blocks: Sequence[BlockView], run: Callable[..., Tensor], attend: Callable[[AttentionView], Callable[..., object]]
) -> None:
    """Makes the first block do the work of all by `run`; the others pass on what they get. Of what was there before,
    nothing stays.

    attend: what the attention modules compute, so that it stays known as theirs when the model is traced.
    """
    first, *others = blocks
    first.module.forward = run
    for block in others:
        block.module.forward = _pass
    for block in blocks:
        block.attention.module.forward = attend(block.attention)


def follow_(root: nn.Module) -> None:
    """Makes attention that was taken over compute by the modules that now stand where its Linears stood."""
    for module in root.modules():
        attend: Any = module.__dict__.get("forward")
        attention = getattr(attend, "attention", None)
        if isinstance(attention, AttentionView):
            maps = {name: getattr(attention, name) for name in ("query", "key", "value", "proj")}
            now = {name: replace(its, module=root.get_submodule(its.name)) for name, its in maps.items()}
            module.forward = replace(attend, attention=replace(attention, **now))


def _pass(x: Tensor, *others: object, **more: object) -> Tensor:
    """The forward of a block that an earlier one has run."""
    return x
