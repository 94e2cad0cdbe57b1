"""The page: one HTML file that asks for nothing outside itself."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet.core.errors import ArtifactError
from martlet.core.report import Document
from martlet.report import charts, patches, units, verdict

if TYPE_CHECKING:
    from jinja2 import Template

HERE = Path(__file__).parent
MAX_LISTED = 12
"""Longer lists are counted, not listed."""


def render(document: Document) -> str:
    """The report as one HTML page.

    Every string of the document is escaped, and a content security policy in the page keeps the browser from loading
    or running anything that did not come with it.
    """
    script = (HERE / "sort.js").read_text(encoding="utf-8")
    page = template("page.html.j2").render(
        d=document,
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        charts=charts,
        patches=patches,
        units=units,
        verdict=verdict,
    )
    # A file name that is not Unicode reaches Python as lone surrogates, which no encoding takes.
    return page.encode("utf-8", "replace").decode("utf-8")


def write(document: Document, path: Path) -> None:
    """Writes the page beside `path`, then renames.

    Raises:
        ArtifactError: the folder is missing, full or not ours.
    """
    write_page(render(document), path)


def write_page(page: str, path: Path) -> None:
    """Writes beside `path`, then renames.

    Raises:
        ArtifactError: the folder is missing, full or not ours.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ArtifactError(f"can't write the page {path}: {error.strerror}") from None


@cache
def template(name: str) -> Template:
    """A page of this folder: everything is escaped, an unknown name is an error, and None is shown as missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: units.MISSING if value is None else value,
    )
    environment.filters |= {"facts": facts, "arxiv": arxiv, "label": label}
    return environment.get_template(name)


def facts(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (key, text) pairs: `versions.torch`, `2.15.0`. Bytes and seconds get their units."""
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            pairs += facts(item, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", _text(str(key), item)))
    return pairs


def arxiv(paper: str) -> str | None:
    """The arXiv id that a citation names."""
    found = re.search(r"arXiv[:\s]*(\d{4}\.\d{4,5})", paper, re.IGNORECASE)
    return found.group(1) if found else None


def label(key: str) -> str:
    """A key for reading: `memory_bytes` is `memory`."""
    return key.removesuffix("_bytes").replace("_", " ")


def _text(key: str, value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and key.endswith("_bytes"):
        return units.size(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        if len(value) > MAX_LISTED or any(isinstance(item, list | tuple | Mapping) for item in value):
            return f"{len(value):,} entries, in report.json"
        return ", ".join(_text("", item) for item in value) or "none"
    return str(value)
