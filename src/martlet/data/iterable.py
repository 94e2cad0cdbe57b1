"""Any Python iterable of images: PIL images, uint8 arrays (H, W, 3), files; alone or with labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from martlet.core.errors import DataError
from martlet.data.images import Record, Source

TAKES = "PIL images, uint8 arrays (H, W, 3) or paths, alone, as (image, label), or as {'image': …, 'label': …}"


class Python(Source):
    """An iterable, or a function that returns a new iterator when called. Items are fetched as they are needed.

    Raises:
        DataError: it is empty, can be gone through only once, or its first item is no image.
    """

    def __init__(self, items: Iterable[Any] | Callable[[], Iterator[Any]], name: str | None = None) -> None:
        self.name = name or f"Python {type(items).__name__}"
        if isinstance(items, Iterator):
            raise DataError(f"{self.name} can be gone through only once; pass a list, or the function that makes it")
        self._items = items
        self.class_names = getattr(items, "class_names", None) or getattr(items, "classes", None)
        if self.class_names is not None:
            self.class_names = tuple(str(name) for name in self.class_names)
        self._length: int | None = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
        first = next(self.records(), None)
        if first is None:
            raise DataError(f"{self.name} holds no images")
        self.labelled = first.label is not None

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(1 for _ in self._iterate())
        return self._length

    def records(self, rows: Sequence[int] | None = None) -> Iterator[Record]:
        if rows is not None and hasattr(self._items, "__getitem__"):
            for row in rows:
                yield self._record(self._items[row], row)  # type: ignore[index]
            return
        wanted = None if rows is None else iter(rows)
        following = None if wanted is None else next(wanted, None)
        for row, item in enumerate(self._iterate()):
            if wanted is None:
                yield self._record(item, row)
            elif row == following:
                yield self._record(item, row)
                if (following := next(wanted, None)) is None:
                    return

    def _iterate(self) -> Iterator[Any]:
        return iter(self._items() if callable(self._items) and not isinstance(self._items, Iterable) else self._items)

    def _record(self, item: Any, row: int) -> Record:
        label, name = None, f"{self.name}[{row}]"
        if isinstance(item, Mapping):
            item, label = item.get("image"), item.get("label")
        elif isinstance(item, tuple | list) and len(item) in (2, 3):
            item, label, name = (*item, name)[:3]
        if label is not None:
            try:
                label = int(label)
            except (TypeError, ValueError):
                raise DataError(f"{name} has the label {label!r}, not the index of a class") from None
        if label is not None and label < 0:
            label = None
        if isinstance(item, str | Path):
            return Record(Path(item), label, str(item))
        return Record(_picture(item, name), label, str(name))


def _picture(item: Any, name: str) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    array = np.asarray(item)
    if array.dtype == np.uint8 and array.ndim in (2, 3):
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
            array = array.transpose(1, 2, 0)  # (H, W, C)
        if array.ndim == 2 or array.shape[2] in (1, 3, 4):
            return Image.fromarray(array.squeeze(2) if array.ndim == 3 and array.shape[2] == 1 else array)
    what = f"an array {array.dtype} {array.shape}" if array.dtype != object else f"a {type(item).__name__}"
    raise DataError(f"{name} is {what}; images are {TAKES}")
