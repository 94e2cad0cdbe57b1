"""A model run block by block, from what the block before gave: each block once a step, and not all that come before."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from martlet.core.technique import Batches
from martlet.vit.view import view

Tap = tuple[nn.Module, Literal["in", "out"]]
"""A module, and whether what goes in is wanted or what comes out."""


class _Stop(Exception):
    """Raised in a forward pass that has seen enough."""


class First:
    """The first images of others, in whole batches, until there are so many."""

    def __init__(self, images: Batches, number: int) -> None:
        self.images, self.number = images, number
        self.num_images = sum(len(batch) for batch in self)

    def __iter__(self) -> Iterator[Tensor]:
        count = 0
        for batch in self.images:
            yield batch
            count += len(batch)
            if count >= self.number:
                return


class Rest:
    """The images of others after the first, of which there are as many as `First` gives."""

    def __init__(self, images: Batches, first: First) -> None:
        self.images, self.first = images, first
        self.num_images = images.num_images - first.num_images

    def __iter__(self) -> Iterator[Tensor]:
        count = 0
        for batch in self.images:
            if count >= self.first.num_images:
                yield batch
            count += len(batch)


class Streams:
    """The tokens of all images after the last block that was run with `keep`, in memory: images × tokens × features.

    Blocks are run in order. What the library does before the first and between stages is run again each time.
    """

    def __init__(self, module: nn.Module, images: Batches) -> None:
        self.module, self.images = module, images
        self.after: list[Any] = []
        """By batch, what block number `done` - 1 gave."""
        self.done = 0

    @torch.no_grad()
    def run(self, taps: Mapping[str, Tap], keep: bool = False) -> Iterator[dict[str, Tensor]]:
        """Runs block number `done` on each batch, and gives what the taps saw.

        keep: makes its tokens those that the next block gets. Else it stops as soon as all taps have seen something.
        """
        number, blocks, after = self.done, view(self.module).blocks, list[Any]()
        seen: dict[str, Tensor] = {}

        def watch(name: str, x: Any) -> None:
            seen[name] = x[0] if isinstance(x, tuple) else x
            if not keep and len(seen) == len(taps):
                raise _Stop

        def end(_module: nn.Module, _args: object, out: Any) -> None:
            after.append(out)
            raise _Stop

        handles = [blocks[number].module.register_forward_hook(end)]
        for name, (module, side) in taps.items():
            if side == "in":
                handles.append(module.register_forward_pre_hook(partial(_given, watch, name)))
            else:
                handles.append(module.register_forward_hook(partial(_gave, watch, name)))
        try:
            for images in self._resumed():
                seen.clear()
                with suppress(_Stop):
                    self.module(images)
                yield dict(seen)
        finally:
            for handle in handles:
                handle.remove()
        if keep:
            self.after, self.done = after, number + 1

    @torch.no_grad()
    def logits(self, batches: int) -> Iterator[Tensor]:
        """What the model gives for the first batches, block number `done` and all later ones being run as they are."""
        with closing(self._resumed()) as resumed:
            for images in itertools.islice(resumed, batches):
                yield self.module(images)

    def _resumed(self) -> Generator[Tensor]:
        """Images by batch, for a forward pass in which blocks before number `done` do nothing but give what they gave.

        Of each batch after the first block one image is enough: what becomes of it is not looked at.
        """
        blocks = view(self.module).blocks[: self.done]
        try:
            for i, images in enumerate(self.images):
                for block in blocks[:-1]:
                    block.module.forward = _pass_as(self.after[i])
                for block in blocks[-1:]:
                    block.module.forward = lambda *_, i=i, **__: self.after[i]
                yield images[:1] if self.done else images
        finally:
            for block in blocks:
                block.module.__dict__.pop("forward", None)


def _given(watch: Callable[[str, Any], None], name: str, _module: nn.Module, args: object) -> None:
    watch(name, args)


def _gave(watch: Callable[[str, Any], None], name: str, _module: nn.Module, _args: object, out: object) -> None:
    watch(name, out)


def _pass_as(like: Any) -> Any:
    """A forward that gives what it gets, in the form of what such a block gives."""

    def forward(x: Tensor, *others: object, **more: object) -> Any:
        return (x, *[None] * (len(like) - 1)) if isinstance(like, tuple) else x

    return forward
