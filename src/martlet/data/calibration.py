"""Calibration images: a seeded sample, preprocessed, to go through again and again in bounded memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch

from martlet.core.errors import DataError
from martlet.core.technique import Batches, Progress, silent
from martlet.data.batches import in_batches
from martlet.data.images import Images
from martlet.data.preprocess import Preprocess

HELD_BYTES = 512 << 20
"""Crops are held as uint8 up to this size (3,500 of 224 × 224); more are decoded again at every pass."""


class Resized:
    """The same images in the same order at another size: decoded again where they can be, else resized.

    labels: theirs; None where they have none.
    """

    def __init__(self, images: Batches, preprocess: Preprocess) -> None:
        self._images, self._preprocess = images, preprocess
        self.num_images, self.labels = images.num_images, getattr(images, "labels", None)

    def __iter__(self) -> Iterator[torch.Tensor]:
        if callable(at := getattr(self._images, "at", None)):
            yield from cast(Batches, at(self._preprocess))
            return
        for batch in self._images:
            yield resize(batch, self._preprocess.size)


def resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """float32 (B, 3, H, W) at another size (H, W)."""
    if tuple(images.shape[-2:]) == size:
        return images
    return torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True)


class First:
    """The first n of calibration images, those before `skipped` left out.

    labels: of the images; None where the others have none.
    """

    def __init__(self, images: Batches, n: int, skipped: int = 0) -> None:
        self._images, self._skipped = images, skipped
        self.num_images = min(n, images.num_images - skipped)
        labels = getattr(images, "labels", None)
        self.labels = None if labels is None else labels[skipped:][:n]

    def at(self, preprocess: Preprocess) -> First:
        """The same images, preprocessed otherwise."""
        return First(Resized(self._images, preprocess), self.num_images, self._skipped)

    def __iter__(self) -> Iterator[torch.Tensor]:
        skip, left = self._skipped, self.num_images
        for batch in self._images:
            if not left:
                return
            if len(part := batch[skip:][:left]):
                yield part
            skip, left = max(0, skip - len(batch)), left - len(part)


class Calibration:
    """n images drawn without replacement; the same seed draws the same.

    labels: of the images, in the order in which they are yielded; None unless all have one.
    Decodes them all once, so that `num_images` counts readable ones only. Yields them shuffled where they are held,
    else in their order; float32 (B, 3, H, W), the last batch perhaps smaller.

    Raises:
        DataError: n or batch_size is not positive, or too many images are unreadable, or all.
    """

    def __init__(
        self,
        images: Images,
        preprocess: Preprocess,
        *,
        n: int = 128,
        batch_size: int = 8,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        if n < 1 or batch_size < 1:
            raise DataError(f"calibration needs at least one image and a batch of one, not {n} and {batch_size}")
        self.batch_size = batch_size
        self.images, self._seed = images.sample(n, seed), seed
        self._others: dict[Preprocess, Calibration] = {}
        self._decode(preprocess, progress)

    def at(self, preprocess: Preprocess) -> Calibration:
        """The same images in the same order, preprocessed otherwise; decoded once."""
        if preprocess == self._preprocess:
            return self
        if preprocess not in self._others:
            twin = self._others[preprocess] = copy.copy(self)
            twin._decode(preprocess, silent)
        return self._others[preprocess]

    def _decode(self, preprocess: Preprocess, progress: Progress) -> None:
        """Holds the crops, if they aren't too many.

        Raises:
            DataError: too many images are unreadable, or all.
        """
        self._preprocess = preprocess
        self._held: np.ndarray | None = None
        shape = (len(self.images), *preprocess.size, 3)
        held = np.empty(shape, np.uint8) if np.prod(shape) <= HELD_BYTES else None
        self.num_images = 0
        labels: list[int | None] = []
        for record, crop in self.images.map(preprocess.crop):
            labels.append(record.label)
            if held is not None:
                held[self.num_images] = crop
            self.num_images += 1
            progress("decode calibration images", self.num_images, len(self.images))
        if not self.num_images:
            raise DataError(f"{self.images.source} has no image that can be read")
        order = np.arange(self.num_images)
        if held is not None:
            order = np.random.default_rng(self._seed).permutation(self.num_images)
            self._held = held[order]
        known = [label for label in labels if label is not None]
        self.labels = np.array(known)[order] if len(known) == self.num_images else None

    def __len__(self) -> int:
        """How many batches."""
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        crops = (crop for _, crop in self.images.map(self._preprocess.crop)) if self._held is None else self._held
        for batch in in_batches(crops, self.batch_size):
            yield torch.from_numpy(self._preprocess.normalize(np.stack(batch)))  # (B, 3, H, W)
