"""What goes where: results to standard output, everything else to standard error, libraries' chatter nowhere."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from martlet.core.technique import Progress

DEBUG = "MARTLET_DEBUG"
"""Set in the environment, it shows tracebacks and what libraries say."""
REDRAW_SECONDS = 0.1


def show(*renderables: RenderableType) -> None:
    """Prints results. A string is taken as it is, on one line however long, so that a path can be copied."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    for renderable in renderables:
        if isinstance(renderable, str):
            console.print(one_line(renderable), markup=False, soft_wrap=True)
        else:
            console.print(renderable)


def emit(document: Mapping[str, Any] | Sequence[Any]) -> None:
    """Prints a document as JSON, in ASCII, which every pipe and every file name survives."""
    print(json.dumps(document, indent=1, allow_nan=False))


def note(message: str) -> None:
    """Tells the user something on standard error, in one line."""
    print(f"martlet: {one_line(message)}", file=sys.stderr)


def note_skipped(names: Sequence[str]) -> None:
    """Names and counts the images that couldn't be read."""
    if names:
        few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        note(f"left out {len(names)} image{'' if len(names) == 1 else 's'} that can't be read: {few}")


Cell = str | tuple[str, ...]
"""Of a table: one line, or several."""


def table(headings: Sequence[str], rows: Iterable[Sequence[Cell]], numbers: Sequence[str] = ()) -> Table:
    """Nothing in a cell is taken for markup. numbers: headings of columns that stand to the right and never fold."""
    made = _table(show_header=True)
    for heading in headings:
        is_number = heading in numbers
        made.add_column(heading, overflow="fold", justify="right" if is_number else "left", no_wrap=is_number)
    return _filled(made, rows)


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values, without headings."""
    made = _table(show_header=False)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    return _filled(made, rows)


def _table(show_header: bool) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=show_header)


def _filled(made: Table, rows: Iterable[Sequence[Cell]]) -> Table:
    from rich.text import Text

    for row in rows:
        cells = ((cell,) if isinstance(cell, str) else cell for cell in row)
        made.add_row(*(Text("\n".join(map(one_line, lines))) for lines in cells))
    return made


def one_line(text: str) -> str:
    """Without line breaks, and without what a terminal would obey."""
    joined = re.sub(r"\s*[\r\n\t]\s*", " ", text.strip())
    return "".join(c if c.isprintable() else "�" for c in joined)


@contextmanager
def working(what: str) -> Iterator[Progress]:
    """For all work that takes time: draws how far it is, and keeps libraries from talking.

    what: the first thing that is done, until progress says another.
    """
    with _quiet(), _bar(what) as progress:
        yield progress


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    """A progress bar on standard error if that is a terminal, and nothing if not.

    It is drawn by whoever reports progress, in between, and by no thread of its own, which would disturb timings.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = Console(stderr=True)
    description = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=40))
    columns = description, BarColumn(bar_width=20), TaskProgressColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=None)
    drawn, drawn_at = what, 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal drawn, drawn_at
        now = time.monotonic()
        if what != drawn or now - drawn_at > REDRAW_SECONDS or done == total:
            drawn, drawn_at = what, now
            bar.update(task, description=what, completed=done, total=total or None, refresh=True)

    with bar:
        yield progress


@contextmanager
def _quiet() -> Iterator[None]:
    """What libraries warn, log or print isn't the user's business; DEBUG lets it through, to standard error."""
    # Hugging Face reads these when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    level, debug = logging.root.manager.disable, DEBUG in os.environ
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        if not debug:
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)
