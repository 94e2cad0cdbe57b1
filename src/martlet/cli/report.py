"""`martlet report`: what was measured, again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from martlet.cli.compress import gate_status
from martlet.cli.options import Json
from martlet.cli.terminal import emit, show
from martlet.core.errors import UsageError


def report(
    artifact: Annotated[Path, Argument(metavar="ARTIFACT", show_default=False, help="The folder of an artifact.")],
    html: Annotated[
        Path | None, Option("--html", metavar="FILE", help="Write the page here too.", show_default=False)
    ] = None,
    json: Json = False,
) -> int:
    """Print an artifact's report again, and write its page elsewhere if asked. Exit status as of `martlet compress`."""
    from martlet.core import store

    loaded = store.load(artifact)
    document, page = loaded.report, html or loaded.path / "report.html"
    if html is not None:
        from martlet.report.html import write

        if html.resolve().parent == loaded.path.resolve():
            raise UsageError(f"{html} would lie in the artifact, whose files are sealed; choose another --html")
        write(document, html)
    if json:
        emit(document)
    else:
        from martlet.report.terminal import summary

        show(summary(document), "", f"Page      {page}")
    return gate_status(document)
