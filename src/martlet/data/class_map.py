"""Class maps: which class of the model a folder, a label or a name stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from martlet.core.errors import DataError, nearest


def read(class_map: str | Path | Mapping[str, int] | Sequence[str]) -> dict[str, int]:
    """Name to class index, from `{"name": index}`, from names in the order of the classes, or from a file of either:
    JSON, or a text file with a name a line.

    Raises:
        DataError: the file is missing or holds something else.
    """
    origin = "the class map"
    if isinstance(class_map, str | Path):
        path, origin = Path(class_map), str(class_map)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            known = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"can't read the class map {path}: {error.strerror}{nearest(path.name, known)}") from None
        except UnicodeDecodeError:
            raise DataError(f"the class map {path} is neither JSON nor text") from None
        if path.suffix == ".json":
            try:
                class_map = json.loads(text)
            except ValueError as error:
                raise DataError(f"the class map {path} is not JSON: {error}") from None
        else:
            class_map = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(class_map, Mapping):
        items = list(class_map.items())
    elif isinstance(class_map, Sequence) and not isinstance(class_map, str):
        items = [(name, index) for index, name in enumerate(class_map)]
    else:
        items = []
    if not items or not all(isinstance(name, str) and type(index) is int and index >= 0 for name, index in items):
        raise DataError(f'{origin} must be {{"name": class index, …}} or a list of names in the order of the classes')
    indices = dict(items)
    if len(indices) != len(items):
        twice = next(name for i, (name, _) in enumerate(items) if name in dict(items[:i]))
        raise DataError(f"{origin} names {twice!r} twice")
    return indices


def labels_of(names: Sequence[str], class_map: Mapping[str, int] | None, source: str) -> dict[str, int]:
    """The label of each name: by the class map, or else its rank among the names.

    Raises:
        DataError: a name isn't in the class map.
    """
    if class_map is None:
        return {name: rank for rank, name in enumerate(sorted(names))}
    if unknown := [name for name in names if name not in class_map]:
        raise DataError(
            f"the class map lacks {len(unknown)} of the {len(names)} classes of {source} ({', '.join(unknown[:3])}"
            f"{', …' if len(unknown) > 3 else ''}{nearest(unknown[0], class_map)})"
        )
    return {name: class_map[name] for name in names}
