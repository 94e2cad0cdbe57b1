"""Batches for evaluation: preprocessed images with their labels and names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np

from martlet.data.images import Images
from martlet.data.preprocess import Preprocess

T = TypeVar("T")


def batches(
    images: Images, preprocess: Preprocess, batch_size: int
) -> Iterator[tuple[np.ndarray, list[int | None], list[str]]]:
    """Yields float32 (B, 3, H, W), B labels (None where unknown) and B names; decoded a little ahead, in threads.

    Unreadable images are left out; `images.skipped` names them.

    Raises:
        DataError: too many images are unreadable, or a label doesn't fit the model.
    """
    for batch in in_batches(images.map(preprocess), batch_size):
        records, arrays = zip(*batch, strict=True)
        yield np.stack(arrays), [record.label for record in records], [record.name for record in records]


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last perhaps shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
