"""Hugging Face image tables: Parquet or Arrow files with an image column and, perhaps, a label column."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from martlet.core.errors import DataError
from martlet.data import class_map as class_maps
from martlet.data.images import Record, Source

LABELS = ("label", "labels", "fine_label", "cls", "class", "target")
IMAGES = ("image", "img", "jpg", "png", "jpeg", "webp")
BATCH_ROWS = 64


class Table(Source):
    """Rows of some files, one after another, read in batches of BATCH_ROWS.

    Raises:
        DataError: a file is damaged, or there is no image column.
    """

    def __init__(self, files: Sequence[Path], name: str, class_map: Mapping[str, int] | None = None) -> None:
        self.name = name
        self._files = [_open(file) for file in files]
        schema = self._files[0].schema
        self._image = _image_column(schema, name)
        self._label = next((column for column in LABELS if column in schema.names), None)
        names = None if self._label is None else _class_names(schema, self._label)
        if self._label is not None:
            self._read_labels(self._label, names, class_map)
        elif class_map is not None:
            raise DataError(f"{name} has no label column for the class map to map (known: {', '.join(LABELS)})")

    def __len__(self) -> int:
        return sum(file.num_rows for file in self._files)

    def records(self, rows: Sequence[int] | None = None) -> Iterator[Record]:
        columns = [self._image] if self._label is None else [self._image, self._label]
        start = 0
        for file in self._files:
            wanted = None
            if rows is not None:
                low, high = bisect_left(rows, start), bisect_left(rows, start + file.num_rows)
                wanted = [row - start for row in rows[low:high]]
            for row, values in file.rows(columns, wanted):
                yield self._record(file.path, row, values)
            start += file.num_rows

    def _record(self, path: Path, row: int, values: Mapping[str, Any]) -> Record:
        image, name = values[self._image], f"{path.name}[{row}]"
        data = image
        if isinstance(image, Mapping):
            if image.get("path"):
                name = Path(image["path"]).name
            data = image.get("bytes") or (path.parent / image["path"] if image.get("path") else b"")
        label = None if self._label is None else self._classes.get(values[self._label])
        return Record(b"" if data is None else data, label, name)

    def _read_labels(self, column: str, names: list[str] | None, class_map: Mapping[str, int] | None) -> None:
        """What each value of the label column stands for; reads that column alone."""
        values: set[Any] = set()
        for file in self._files:
            values |= file.distinct(column)
        values.discard(None)
        if all(isinstance(value, str) for value in values):
            classes = class_maps.labels_of(sorted(values), class_map, self.name)
            if class_map is None:
                self.class_names, self.positional = tuple(classes), len(classes)
        elif all(isinstance(value, int) for value in values):
            told = sorted(value for value in values if value >= 0)  # -1 is Hugging Face's "not told"
            classes = {value: value for value in told}
            if class_map is not None:
                spelled = [names[value] if names and value < len(names) else str(value) for value in told]
                labels = class_maps.labels_of(spelled, class_map, self.name)
                classes = {value: labels[name] for value, name in zip(told, spelled, strict=True)}
            else:
                self.class_names = None if names is None else tuple(names)
        else:
            raise DataError(f"the column {column!r} of {self.name} holds neither class indices nor names")
        self._classes: dict[Any, int] = classes
        self.labelled = bool(classes)
        self.max_label = max(classes.values(), default=None)


class _Parquet:
    """A .parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pq.ParquetFile(path) as file:
            self.schema, self.num_rows = file.schema_arrow, file.metadata.num_rows

    def rows(self, columns: list[str], wanted: list[int] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Reads only row groups that hold a wanted row, and holds at most one of them."""
        with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if wanted is None or bisect_left(wanted, start) < bisect_left(wanted, end):
                    yield from _rows(file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns), start, wanted)
                start = end

    def distinct(self, column: str) -> set[Any]:
        with pq.ParquetFile(self.path) as file:
            batches = file.iter_batches(columns=[column])
            return {value for batch in batches for value in batch.column(0).unique().to_pylist()}


class _Arrow:
    """An .arrow file, in the stream format that `datasets` writes or in the file format; mapped, not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        source = pa.memory_map(str(path))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        self._table = (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()
        self.schema, self.num_rows = self._table.schema, self._table.num_rows

    def rows(self, columns: list[str], wanted: list[int] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        return _rows(iter(self._table.select(columns).to_batches(max_chunksize=BATCH_ROWS)), 0, wanted)

    def distinct(self, column: str) -> set[Any]:
        return set(self._table.column(column).unique().to_pylist())


def _open(path: Path) -> _Parquet | _Arrow:
    try:
        return _Parquet(path) if path.suffix == ".parquet" else _Arrow(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged or no {path.suffix} file: {str(error).splitlines()[0]}") from None


def _rows(
    batches: Iterator[pa.RecordBatch], start: int, wanted: list[int] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Wanted rows of batches of which the first begins at row `start`."""
    for batch in batches:
        end = start + batch.num_rows
        rows = range(start, end) if wanted is None else wanted[bisect_left(wanted, start) : bisect_left(wanted, end)]
        if rows:
            chosen = batch if wanted is None else batch.take(pa.array([row - start for row in rows]))
            yield from zip(rows, chosen.to_pylist(), strict=True)
        start = end


def _image_column(schema: pa.Schema, name: str) -> str:
    fits = [
        field.name
        for field in schema
        if pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
        or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    for column in (*IMAGES, *(fits if len(fits) == 1 else ())):
        if column in fits:
            return column
    raise DataError(
        f"{name} has no image column (struct of bytes and path, or bytes, named {', '.join(IMAGES[:2])}); "
        f"its columns are {', '.join(schema.names) or 'none'}"
    )


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Names that `datasets` keeps beside a label column."""
    kept = (schema.metadata or {}).get(b"huggingface")
    if kept is None:
        return None
    feature = json.loads(kept).get("info", {}).get("features", {}).get(column, {})
    return feature.get("names") if isinstance(feature, dict) else None
