"""Blocks run part by part: what norms, attention, scales and Linears of a view do to tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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


class Projected(NamedTuple):
    """Query, key and value of tokens. flat: as the projections give them, (B, N, H D) each; heads: (B, H, N, D)."""

    flat: tuple[Tensor, Tensor, Tensor]
    heads: tuple[Tensor, Tensor, Tensor]


def project(attention: AttentionView, x: Tensor) -> Projected:
    """Query, key and value, from one Linear or three. What of it isn't used, a trace leaves out."""
    maps = (attention.query, attention.key, attention.value)
    if not attention.is_fused:
        query, key, value = (linear(each, x) for each in maps)
        return Projected((query, key, value), _in_heads(attention, query, key, value))
    order = sorted(range(3), key=lambda i: maps[i].rows.start)
    widths = [maps[i].rows.stop - maps[i].rows.start for i in order]
    y = linear(maps[0], x)
    parts = y.split(widths, -1)
    query, key, value = (parts[order.index(i)] for i in range(3))
    if len({*widths}) > 1:
        return Projected((query, key, value), _in_heads(attention, query, key, value))
    # turned all at once, as engines know it: a third of the time of three turned one by one
    turned = y.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D) each
    return Projected((query, key, value), (turned[order.index(0)], turned[order.index(1)], turned[order.index(2)]))


def _in_heads(attention: AttentionView, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return split_heads(attention, q), split_heads(attention, k), split_heads(attention, v)


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
