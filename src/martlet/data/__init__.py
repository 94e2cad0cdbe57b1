"""Images: where they come from, how a model wants them, and samples of them for calibration."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from martlet.core.errors import DataError, nearest

if TYPE_CHECKING:
    from martlet.data.images import Images, Source

__all__ = ["FORMS", "open_images"]

FORMS = "a folder of images, a .parquet or .arrow file or a folder of them, .tar shards, or martlet:digits"
DIGITS: dict[str, Literal["train", "test"]] = {
    "martlet:digits": "test",
    "martlet:digits-test": "test",
    "martlet:digits-train": "train",
}
SPLITS = ("train", "validation", "val", "valid", "dev", "test")
TABLES = (".parquet", ".arrow")


def open_images(
    spec: Images | str | Path | Iterable[Any],
    *,
    class_map: str | Path | Mapping[str, int] | Sequence[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Images:
    """Opens images, without reading them yet.

    spec: one of FORMS (shards as `train-{000..009}.tar` or `train-*.tar` too), or a Python iterable of PIL images,
    uint8 arrays (H, W, 3) or paths, alone or with labels; or Images already opened.
    class_map: class index by name, or names in the order of the classes, or a file of either; for folders and labels
    that aren't in the model's order.
    split: which of the parts of a folder (`train`, `test` …).
    limit: at most this many, drawn with `seed`, in their order.

    Raises:
        DataError: missing, empty, damaged, of no known form, or with classes that the class map lacks.
    """
    from martlet.data import class_map as class_maps
    from martlet.data.images import Images

    if limit is not None and limit < 1:
        raise DataError(f"a limit is at least one image, not {limit}")
    if isinstance(spec, Images):
        _refuse(class_map, split, f"{spec.source}, already opened,")
        images = spec
    else:
        images = Images(_source(spec, None if class_map is None else class_maps.read(class_map), split))
    if limit is not None:
        images = images.sample(limit, seed)
    if isinstance(spec, str | Path) and isinstance(class_map, str | Path | None):
        paths = {"spec": str(spec), "class_map": class_map and str(class_map), "split": split}
        images.opened = {**paths, "limit": limit, "seed": seed}
    return images


def _source(spec: str | Path | Iterable[Any], class_map: dict[str, int] | None, split: str | None) -> Source:
    from martlet.data.iterable import Python

    if not isinstance(spec, str | Path):
        _refuse(class_map, split, "images from Python")
        return Python(spec)
    name, path = str(spec), Path(spec)
    if name in DIGITS:
        from martlet.data.embedded import open_digits

        _refuse(class_map, split, name)
        return Python(open_digits(DIGITS[name]), name)
    if path.suffix == ".tar" or re.search(r"[*?{]", name):
        _refuse(None, split, name)
        return _shards(_expand(name), name, class_map)
    if path.is_dir():
        return _folder(path, class_map, split)
    if not path.exists():
        known = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"there are no images at {name}{nearest(path.name, known)} (forms: {FORMS})")
    if path.suffix not in TABLES:
        raise DataError(f"{name} is neither a table nor a folder of images (forms: {FORMS})")
    _refuse(None, split, name)
    return _table([path], name, class_map)


def _folder(path: Path, class_map: dict[str, int] | None, split: str | None) -> Source:
    """What the folder holds: shards, tables, or images."""
    if shards := sorted(path.glob("*.tar")):
        return _shards(_of_split(shards, split, path), str(path), class_map)
    tables = sorted(file for suffix in TABLES for file in path.rglob(f"*{suffix}"))
    # `datasets` leaves what it computed once in cache-*.arrow, beside what it saved.
    if tables := [file for file in tables if not file.name.startswith("cache-")]:
        return _table(_of_split(tables, split, path), str(path), class_map)
    from martlet.data.folder import Folder

    folders = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if split is not None:
        if split not in folders:
            raise DataError(f"{path} has no split {split!r}{nearest(split, folders)}")
        path = path / split
    elif len(folders) > 1 and set(folders) <= set(SPLITS):
        raise DataError(f"{path} has the splits {', '.join(folders)}; say which with --split")
    return Folder(path, class_map)


def _of_split(files: list[Path], split: str | None, root: Path) -> list[Path]:
    """The files of one split, told by a folder or the file's name: `test/…`, `test.parquet`, `test-00000-of-00002…`."""

    def split_of(file: Path) -> str | None:
        folders = file.relative_to(root).parts[:-1]
        stem = re.split(r"[-_.]", file.stem)[0]
        return next((word for word in (*folders, stem) if word in SPLITS or word == split), None)

    found = {split_of(file) for file in files}
    if split is None:
        if len(found) > 1:
            known = sorted(word or "(unnamed)" for word in found)
            raise DataError(f"{root} has the splits {', '.join(known)}; say which with --split")
        return files
    if split not in found:
        known = sorted(word for word in found if word)
        raise DataError(f"{root} has no split {split!r} (known: {', '.join(known) or 'none'})")
    return [file for file in files if split_of(file) == split]


def _expand(pattern: str) -> list[Path]:
    """Files of a pattern with braces (`{000..009}`, `{a,b}`) and wildcards."""
    choices: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        if span := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            first, last = span.groups()
            choices.append([str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)])
        elif part.startswith("{"):
            choices.append(part[1:-1].split(","))
        else:
            choices.append([part])
    files: list[Path] = []
    for parts in itertools.product(*choices):
        name = "".join(parts)
        matches = sorted(glob.glob(name)) if re.search(r"[*?]", name) else [name]
        if missing := next((match for match in matches if not Path(match).is_file()), None if matches else name):
            known = [other.name for other in Path(missing).parent.glob("*.tar")]
            raise DataError(f"there is no shard {missing}{nearest(Path(missing).name, known)}")
        files += map(Path, matches)
    if other := [file for file in files if file.suffix != ".tar"]:
        raise DataError(f"{other[0]} is no .tar shard (forms: {FORMS})")
    return files


def _shards(files: list[Path], name: str, class_map: dict[str, int] | None) -> Source:
    from martlet.data.webdataset import Shards

    return Shards(files, name, class_map)


def _table(files: list[Path], name: str, class_map: dict[str, int] | None) -> Source:
    from martlet.data.parquet import Table

    return Table(files, name, class_map)


def _refuse(class_map: object, split: str | None, name: str) -> None:
    if class_map is not None:
        raise DataError(f"{name} takes no class map")
    if split is not None:
        raise DataError(f"{name} has no splits; leave --split away")
