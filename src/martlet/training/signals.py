"""What blocks of a vision transformer give on the way to its logits: tokens, and what attention compares."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from martlet.core.errors import SourceError
from martlet.vit.view import LinearView, view


@dataclass(frozen=True)
class Signals:
    """Of one forward pass. By block: tokens (B, N, C); query, key and value (…, N, H D), in Swin by window."""

    tokens: tuple[Tensor, ...]
    attention: tuple[tuple[Tensor, Tensor, Tensor], ...]

    def at(self, blocks: Sequence[int]) -> Signals:
        """Those of some blocks, in that order."""
        attention = tuple(self.attention[i] for i in blocks if self.attention)
        return Signals(tuple(self.tokens[i] for i in blocks), attention)


def observe(module: nn.Module, images: Tensor, attention: bool = False) -> tuple[Tensor, Signals]:
    """Logits (B, K), and the signals of all blocks, with their gradients. The module is left as it was.

    attention: query, key and value are wanted too; else there are none.

    Raises:
        SourceError: no vision transformer that can be taken apart; one whose blocks tokens don't go through one by one,
            as after a reduction of tokens; or, with attention, one that computes q, k and v inside of another module.
    """
    blocks = view(module).blocks
    seen: dict[Any, Tensor] = {}

    def keep(key: Any, rows: slice | None, _module: nn.Module, _inputs: object, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        seen[key] = out if rows is None else out[..., rows]

    with ExitStack() as stack:

        def watch(watched: nn.Module, key: Any, rows: slice | None = None) -> None:
            stack.callback(watched.register_forward_hook(partial(keep, key, rows)).remove)

        for i, block in enumerate(blocks):
            watch(block.module, i)
            for name in ("query", "key", "value") if attention else ():
                its: LinearView = getattr(block.attention, name)
                if its.weight_name == "weight":  # its module gives what it computes, and not what becomes of it
                    watch(its.module, (i, name), its.rows)
        logits = module(images)
    wanted = [(i, name) for i in range(len(blocks)) for name in ("query", "key", "value")] if attention else []
    if missing := [key for key in [*range(len(blocks)), *wanted] if key not in seen]:
        i, what = missing[0] if isinstance(missing[0], tuple) else (missing[0], "tokens")
        raise SourceError(
            f"{blocks[i].name} of {type(module).__name__} doesn't show its {what}; leave these signals out"
        )
    triples = tuple(
        (seen[i, "query"], seen[i, "key"], seen[i, "value"]) for i in range(len(blocks) if attention else 0)
    )
    return logits, Signals(tuple(seen[i] for i in range(len(blocks))), triples)


def counterparts(student: int, teacher: int) -> list[int]:
    """For each of a student's blocks the teacher's that is as deep: the last for the last, and evenly before it."""
    return [-(-(i + 1) * teacher // student) - 1 for i in range(student)]
