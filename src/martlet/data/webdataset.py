"""Tar shards as webdataset writes them: the members of a sample stand together and share the name before the dot."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from martlet.core.errors import DataError
from martlet.data import class_map as class_maps
from martlet.data.images import CLASS_MAP_HINT, Record, Source

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
LABELS = ("cls", "json")
JSON_LABELS = ("label", "cls", "class")


class Shards(Source):
    """Samples of some shards, one after another. Opening reads the headers and labels of every shard once.

    Raises:
        DataError: a shard is damaged, or there are no images in them.
    """

    def __init__(self, files: Sequence[Path], name: str, class_map: Mapping[str, int] | None = None) -> None:
        self.name = name
        self._files = list(files)
        self._class_map = class_map
        self._length = 0
        for record in self._records(None, contents=False):
            self._length += 1
            if record.label is not None:
                self.labelled = True
                self.max_label = max(record.label, self.max_label or 0)
        if not self._length:
            raise DataError(f"{name} holds no images ({', '.join(IMAGES)})")

    def __len__(self) -> int:
        return self._length

    def records(self, rows: Sequence[int] | None = None) -> Iterator[Record]:
        return self._records(rows, contents=True)

    def _records(self, rows: Sequence[int] | None, *, contents: bool) -> Iterator[Record]:
        """contents: read the images too, and not only their labels."""
        wanted = None if rows is None else iter(rows)
        following = None if wanted is None else next(wanted, None)
        row = 0
        for file in self._files:
            with _open(file) as tar:
                for key, members in _samples(tar, file):
                    image = next((members[kind] for kind in IMAGES if kind in members), None)
                    if image is None:
                        continue
                    if wanted is None or row == following:
                        data = _read(tar, image, file) if contents else b""
                        yield Record(data, self._label(tar, members, file), f"{key}.{image.name.rpartition('.')[2]}")
                        if wanted is not None and (following := next(wanted, None)) is None:
                            return
                    row += 1

    def _label(self, tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], file: Path) -> int | None:
        kind = next((kind for kind in LABELS if kind in members), None)
        if kind is None:
            return None
        text = _read(tar, members[kind], file).decode("utf-8", errors="replace").strip()
        if kind == "json":
            try:
                found = json.loads(text)
            except ValueError as error:
                raise DataError(f"{members[kind].name} of {file} is not JSON: {error}") from None
            if not isinstance(found, dict) or (name := next((n for n in JSON_LABELS if n in found), None)) is None:
                return None
            text = str(found[name])
        if self._class_map is not None:
            return class_maps.labels_of([text], self._class_map, self.name)[text]
        try:
            return int(text) if int(text) >= 0 else None
        except ValueError:
            raise DataError(
                f"{members[kind].name} of {file} says {text[:40]!r}, not a class; {CLASS_MAP_HINT}"
            ) from None


def _open(file: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(file, "r:")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{file} is damaged or no uncompressed tar file: {error}") from None


def _samples(tar: tarfile.TarFile, file: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Neighbors of one key, by kind: what follows the first dot of the name."""
    try:
        named = (member for member in tar if member.isfile() and not posixpath.basename(member.name).startswith("."))
        for key, members in groupby(named, key=lambda member: _split(member.name)[0]):
            yield key, {_split(member.name)[1]: member for member in members}
        with file.open("rb") as raw:
            raw.seek(tar.offset)
            whole = raw.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{file} is damaged: {error}") from None
    if not whole:  # tarfile takes a cut header for the end
        raise DataError(f"{file} is damaged: it is cut short")


def _split(name: str) -> tuple[str, str]:
    folder, base = posixpath.split(name)
    stem, _, kind = base.partition(".")
    return posixpath.join(folder, stem), kind.lower()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> bytes:
    found = tar.extractfile(member)
    if found is None:
        raise DataError(f"{member.name} of {file} is no file")
    return found.read()
