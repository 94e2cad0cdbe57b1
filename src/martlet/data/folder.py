"""A folder of images: a subfolder a class, or all in one, without labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from martlet.core.errors import DataError
from martlet.data import class_map as class_maps
from martlet.data.images import Record, Source

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jp2", ".avif")


class Folder(Source):
    """Images of a folder, in the order of their paths. Holds only the paths.

    Without a class map a class is the rank of its folder's name, as text: `10` comes before `2`, as in torchvision.

    Raises:
        DataError: no images in it, or a class that the class map lacks.
    """

    def __init__(self, path: Path, class_map: Mapping[str, int] | None = None) -> None:
        self.name = str(path)
        self._path = path
        self._files = sorted(_walk(path))
        if not self._files:
            raise DataError(f"{path} holds no images ({', '.join(SUFFIXES[:4])} …)")
        classes = sorted({file.split("/")[0] for file in self._files if "/" in file})
        flat = [file for file in self._files if "/" not in file]
        if classes and flat:
            raise DataError(
                f"{path} holds both class folders ({classes[0]}, …) and loose images ({flat[0]}, …); "
                f"move the loose ones into their classes, or away"
            )
        self.labelled = bool(classes)
        if not classes:
            if class_map is not None:
                raise DataError(f"{path} has no class folders for the class map to map; leave the class map away")
            self._labels = {}
            return
        self._labels = class_maps.labels_of(classes, class_map, self.name)
        self.max_label = max(self._labels.values())
        if class_map is None:
            self.class_names, self.positional = tuple(classes), len(classes)

    def __len__(self) -> int:
        return len(self._files)

    def records(self, rows: Sequence[int] | None = None) -> Iterator[Record]:
        for row in range(len(self._files)) if rows is None else rows:
            file = self._files[row]
            yield Record(self._path / file, self._labels.get(file.split("/")[0]), file)


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of images, with forward slashes; hidden files and folders left out."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()
