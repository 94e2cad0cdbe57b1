"""What a model reads of its tokens, and whether its blocks can be run from their parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from martlet.core.errors import NumericsError, SourceError
from martlet.core.model import Model
from martlet.vit.token_run import Patches, TokenRun, install_
from martlet.vit.view import VitView, view

MAX_RELATIVE_ERROR = 1e-3
"""Of the logits, in the Euclidean norm, when blocks are run from their parts. Rounding gives under 1e-5."""


class Taken:
    """A copy of a model, taken apart so that its blocks can be run from any of them on, in many ways."""

    def __init__(self, model: Model) -> None:
        twin = model.copy()
        self.module, self.vit = twin.module, view(twin.module)
        self.found = reading(twin, self.vit)
        self.patches = patches_of(self.vit, self.found.num_tokens)
        install_(TokenRun(self.vit.blocks, self.patches))
        self._first = self.vit.blocks[0].module

    def before(self, images: Tensor) -> list[Tensor]:
        """The tokens (B, N, C) that each block of the untouched model gets, and those that the last gives."""
        found: list[Tensor] = []

        def run(x: Tensor, *others: object, **more: object) -> Tensor:
            found.append(x)
            for block in self.vit.blocks:
                found.append(TokenRun((block,), self.patches)(found[-1]))
            return found[-1]

        self._first.forward = run
        self.module(images)
        return found

    def logits(self, images: Tensor, y: Tensor) -> Tensor:
        """What the model makes of the tokens (B, M, C) that its last block gave for the images."""
        self._first.forward = lambda *_, **__: y
        return self.module(images)


class Reading(NamedTuple):
    """How many tokens the blocks get, and how many leading ones of the last block's are read; None if more are."""

    num_tokens: int
    num_read: int | None


def reading(model: Model, vit: VitView) -> Reading:
    """Found by running the model: a token is read if NaN in its place makes the logits NaN."""
    last, seen, num_read = vit.blocks[-1], [0], None

    def poison(y: object, num_read: int | None) -> Tensor:
        if not isinstance(y, Tensor) or y.ndim != 3:
            raise SourceError(f"{type(last.module).__name__} at {last.name} doesn't give tokens (B, N, C)")
        seen.append(y.shape[1])
        return y if num_read is None else y.index_fill(1, torch.arange(num_read, y.shape[1]), float("nan"))

    for num_read in (*range(1, vit.tokens.num_prefix + 1), None):
        handle = last.module.register_forward_hook(lambda _, __, y, num_read=num_read: poison(y, num_read))
        try:
            if not logits_of_noise(model).isnan().any():
                break
        finally:
            handle.remove()
    return Reading(seen[-1], num_read)


def patches_of(vit: VitView, num_tokens: int) -> Patches:
    """The patches among so many tokens; they have places if none is missing."""
    first = vit.tokens.num_prefix
    return Patches(first, num_tokens - first, vit.tokens.grid if vit.tokens.num_tokens == num_tokens else None)


def check_global(vit: VitView, technique: str) -> None:
    """Raises:
    SourceError: attention is inside windows.
    """
    for block in vit.blocks:
        if block.attention.window is not None:
            raise SourceError(
                f"{technique}: attention at {block.name} is inside windows, which need all their tokens; it takes "
                "models whose attention is global, such as ViT, DeiT and DINOv2"
            )


def run_from_parts_(model: Model, vit: VitView, first: int, technique: str) -> None:
    """Runs the blocks from `first` on by their parts in the view, for a technique to change how.

    Raises:
        NumericsError: that gives other logits than the blocks themselves.
    """
    with same_logits(model, vit.blocks[first].name, technique):
        install_(TokenRun(vit.blocks[first:], Patches(0, 0, None)))


@contextmanager
def same_logits(model: Model, block: str, technique: str) -> Iterator[None]:
    """Asks that the model gives the same after what is done inside, which is to run blocks by their parts.

    block: where that begins.

    Raises:
        NumericsError: it doesn't.
    """
    before = logits_of_noise(model)
    yield
    error = (logits_of_noise(model) - before).norm() / before.norm()
    if not error <= MAX_RELATIVE_ERROR:  # NaN too
        raise NumericsError(
            f"{technique}: from {block} on, {model.name} computes something that the parts of its blocks don't (the "
            f"logits differ by {float(error):.1%}); leave {technique} out of the recipe"
        )


def logits_of_noise(model: Model) -> Tensor:
    """Of one image of noise."""
    images = torch.randn(1, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.module.eval()(images)
