"""What a space has measured so far, in a file, so that it can go on after it was stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Record:
    """A JSON file."""

    path: Path
    data: dict[str, Any]

    def save(self) -> None:
        write(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")


def write(path: Path, text: str) -> None:
    """Beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
