"""All that a search has measured so far, in a file, so that it can go on after it was stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from martlet.core.errors import ArtifactError, UsageError

VERSION = 1


@dataclass
class Record:
    """JSON beside the recipe that is to be found."""

    path: Path
    data: dict[str, Any]

    @classmethod
    def open(cls, recipe: Path, job: dict[str, Any], overwrite: bool) -> Record:
        """The record beside a recipe; new if there is none.

        Raises:
            UsageError: it is of another job. ArtifactError: it is no such record.
        """
        path = recipe.with_suffix(".json")
        if overwrite or not path.exists():
            if recipe.exists() and not overwrite:
                raise UsageError(f"{recipe} exists; add --overwrite to replace it, or choose another --out")
            return cls(path, {"martlet_search": VERSION, "job": job})
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = data["job"] if data["martlet_search"] == VERSION else None
        except (OSError, ValueError, KeyError, TypeError):
            data, found = {}, None
        if not isinstance(found, dict):
            raise ArtifactError(
                f"{path} is no record of a search; add --overwrite to replace it, or choose another --out"
            )
        other = next((key for key in job if found.get(key) != job[key]), None)
        if other is not None:
            raise UsageError(
                f"{path} is of a search with another {other}; add --overwrite to replace it, or choose another --out"
            )
        return cls(path, data)

    def save(self) -> None:
        write(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")


def write(path: Path, text: str) -> None:
    """Beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
