"""Which techniques there are, read from source text: listing them imports none of them."""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from martlet.core.errors import RecipeError, nearest
from martlet.core.technique import Technique

TECHNIQUES = Path(__file__).parent.parent / "techniques"


@dataclass(frozen=True)
class Entry:
    """What a technique's file says of it."""

    name: str
    family: str
    summary: str
    paper: str
    class_name: str

    @property
    def module(self) -> str:
        return f"martlet.techniques.{self.family}.{self.name}"


@cache
def entries() -> MappingProxyType[str, Entry]:
    """Every technique by name, families in order.

    Raises:
        TypeError: two files claim a name, or a file holds no technique of its own name (a defect of the package).
    """
    found: dict[str, Entry] = {}
    for path in sorted(TECHNIQUES.glob("*/*.py")):
        if path.stem == "__init__":
            continue
        entry = _read(path)
        if entry.name in found:
            raise TypeError(f"two techniques are named {entry.name}: {found[entry.name].module} and {entry.module}")
        found[entry.name] = entry
    return MappingProxyType(found)


def technique(name: str) -> type[Technique]:
    """The class of a technique. Imports its file.

    Raises:
        RecipeError: there is no technique of that name.
    """
    if name not in entries():
        raise RecipeError(f"there is no technique {name!r}{nearest(name, entries())} (see: martlet list techniques)")
    entry = entries()[name]
    return getattr(importlib.import_module(entry.module), entry.class_name)


def _read(path: Path) -> Entry:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        variables = {
            statement.target.id: ast.literal_eval(statement.value)
            for statement in node.body
            if isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(statement.value, ast.Constant)
        }
        if variables.get("name") == path.stem:
            return Entry(path.stem, path.parent.name, variables["summary"], variables.get("paper", ""), node.name)
    raise TypeError(f'{path} has no class with `name: ClassVar[str] = "{path.stem}"`')
