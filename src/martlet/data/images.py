"""Images: an order of pictures that can be gone through again and again, decoded one by one."""

from __future__ import annotations

import io
import os
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from martlet.core.errors import DataError

T = TypeVar("T")

MAX_SKIPPED_RATIO = 0.05
"""More unreadable images than this, and more than one, and the data is damaged rather than blemished."""
CLASS_MAP_HINT = "give a class map: a JSON or text file that says which class of the model each name is"


class UnreadableError(Exception):
    """An image that can't be decoded."""


@dataclass(frozen=True)
class Sample:
    """A decoded image. label: the index of its class, None if unknown. name: what its source calls it."""

    image: Image.Image
    label: int | None
    name: str


@dataclass(frozen=True)
class Record:
    """An image as it is stored: encoded bytes, a file, or already a picture."""

    data: bytes | Path | Image.Image
    label: int | None
    name: str

    def decode(self) -> Image.Image:
        """The picture, in RGB.

        Raises:
            UnreadableError: truncated, malformed, or no image.
        """
        if isinstance(self.data, Image.Image):
            return self.data.convert("RGB")
        try:
            with Image.open(io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise UnreadableError(str(error) or type(error).__name__) from error


class Source(ABC):
    """A place where images are stored, in one format. One file a format.

    name: as the user typed it. class_names: in the order of the labels, if known. labelled: whether there are labels.
    max_label: the highest, if that can be known without reading everything. positional: how many classes there are, if
    a label is only the rank of its name among the names found; that need not be the model's order.
    """

    name: str
    labelled: bool = False
    class_names: tuple[str, ...] | None = None
    max_label: int | None = None
    positional: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many images."""

    @abstractmethod
    def records(self, rows: Sequence[int] | None = None) -> Iterator[Record]:
        """Yields all images, or those of some ascending rows, holding few of them in memory."""


class Images:
    """Images of a source, or a part of them; decoded when gone through, and skipped where they can't be.

    rows: ascending; None for all.
    skipped: names of images found unreadable so far.
    opened: what `open_images` was given, as JSON, to open them again; None if that can't be written down.
    """

    opened: dict[str, Any] | None = None

    def __init__(self, source: Source, rows: Sequence[int] | None = None) -> None:
        self._source = source
        self._rows = rows
        self._num_classes: int | None = None
        self.skipped: list[str] = []

    @property
    def source(self) -> str:
        """Where they come from, as the user typed it."""
        return self._source.name

    @property
    def labelled(self) -> bool:
        return self._source.labelled

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self._source.class_names

    def __len__(self) -> int:
        """How many, unreadable ones included. Counting may read the headers of a stream once."""
        return len(self._source) if self._rows is None else len(self._rows)

    def __iter__(self) -> Iterator[Sample]:
        """Raises:
        DataError: more than MAX_SKIPPED_RATIO and more than one are unreadable, or a label doesn't fit the model.
        """
        for record, image in self.map(lambda image: image):
            yield Sample(image, record.label, record.name)

    def split(self, n: int, seed: int = 0) -> tuple[Images, Images]:
        """n of them drawn without replacement, and the others; both in their order."""
        rows = np.arange(len(self)) if self._rows is None else np.asarray(self._rows, int)
        drawn = np.zeros(len(rows), bool)
        drawn[np.random.default_rng(seed).permutation(len(rows))[:n]] = True
        return self._part(rows[drawn]), self._part(rows[~drawn])

    def sample(self, n: int, seed: int = 0) -> Images:
        """n of them, drawn without replacement, in their order; all, if there are no more than n."""
        return self if n >= len(self) else self.split(n, seed)[0]

    def _part(self, rows: np.ndarray) -> Images:
        part = Images(self._source, rows.tolist())
        part._num_classes = self._num_classes
        return part

    def map(self, function: Callable[[Image.Image], T]) -> Iterator[tuple[Record, T]]:
        """Decodes and applies a function in a few threads, in order, a few images ahead of the caller.

        Raises:
            DataError: as iterating.
        """
        threads = min(4, os.cpu_count() or 1)
        waiting: deque[tuple[Record, Future[T]]] = deque()
        skipped = 0
        with ThreadPoolExecutor(threads) as pool:
            records = self._source.records(self._rows)
            while True:
                while len(waiting) < 2 * threads and (record := next(records, None)) is not None:
                    self._check_label(record)
                    waiting.append((record, pool.submit(lambda record: function(record.decode()), record)))
                if not waiting:
                    return
                record, future = waiting.popleft()
                try:
                    result = future.result()
                except UnreadableError as error:
                    skipped += 1
                    self._skip(record.name, skipped, error)
                else:
                    yield record, result

    def check_labels(self, num_classes: int) -> None:
        """Makes sure that labels are classes of the model; those that aren't known yet, when they are read.

        Raises:
            DataError: a label is past the model's last class, or labels are ranks of names in a set that has other
            classes than the model.
        """
        self._num_classes = num_classes
        ranked = self._source.positional
        if ranked is not None and ranked != num_classes:
            raise DataError(
                f"{self.source} has {ranked} classes and the model {num_classes}, so the order of the names doesn't "
                f"say which is which; {CLASS_MAP_HINT}"
            )
        if self._source.max_label is not None and self._source.max_label >= num_classes:
            raise DataError(
                f"labels of {self.source} reach {self._source.max_label}, and the model has {num_classes} classes "
                f"(0 to {num_classes - 1}); {CLASS_MAP_HINT}"
            )

    def _check_label(self, record: Record) -> None:
        if record.label is not None and self._num_classes is not None and not record.label < self._num_classes:
            raise DataError(
                f"{record.name} of {self.source} has the label {record.label}, and the model has {self._num_classes} "
                f"classes (0 to {self._num_classes - 1}); {CLASS_MAP_HINT}"
            )

    def _skip(self, name: str, skipped: int, error: UnreadableError) -> None:
        if name not in self.skipped:
            self.skipped.append(name)
        if skipped > max(MAX_SKIPPED_RATIO * len(self), 1):
            names = ", ".join(self.skipped[:3]) + (", …" if len(self.skipped) > 3 else "")
            raise DataError(
                f"more than {MAX_SKIPPED_RATIO:.0%} of {self.source} can't be read: {skipped} of {len(self)} images so "
                f"far ({names}: {error}); remove or replace them"
            )
