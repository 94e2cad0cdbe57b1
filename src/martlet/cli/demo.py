"""`martlet demo`: the main job on what comes with Martlet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Context, Option

from martlet.cli.compress import run
from martlet.cli.options import Json, Overwrite, Threads

if TYPE_CHECKING:
    from martlet.core.store import Artifact
    from martlet.core.technique import Progress


def demo(
    ctx: Context,
    out: Annotated[Path, Option(metavar="DIR", help="The artifact folder to write.")] = Path("martlet-demo"),
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Compress a small vision transformer that comes with Martlet, on real handwritten digits.

    Nothing is downloaded: the digits come with the extra `martlet[demo]`. Exit status as of `martlet compress`.
    """

    def job(progress: Progress) -> Artifact:
        from martlet.job import compress

        return compress(
            "martlet:digit_vit",
            images="martlet:digits",
            calib="martlet:digits-train",
            out=out,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
            command=ctx.obj,
        )

    return run(job, json)
