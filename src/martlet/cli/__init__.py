"""The command line: one file a verb. Nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from martlet.cli import bench, cascade, compress, demo, explain, inspect, merge, report, search, train
from martlet.cli import eval as evaluation
from martlet.cli import list as listing
from martlet.cli.options import expanded
from martlet.cli.stop import Stopped, stoppable
from martlet.cli.terminal import DEBUG, one_line
from martlet.core.errors import MartletError

__all__ = ["app", "main"]

app = typer.Typer(
    name="martlet",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from martlet import __version__

        print(f"martlet {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def martlet(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """Any vision model in, with a budget; a deployable file out, with measured proof.

    Exit status: 0 done, 1 failed, 2 bad use, 3 the gate failed and the artifact is kept.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), nl=False)


for _name, _verb in {
    "compress": compress.compress,
    "cascade": cascade.cascade,
    "train": train.train,
    "merge": merge.merge,
    "demo": demo.demo,
    "inspect": inspect.inspect,
    "eval": evaluation.evaluate,
    "search": search.search,
    "explain": explain.explain,
    "bench": bench.bench,
    "report": report.report,
    "list": listing.list_,
}.items():
    app.command(_name)(expanded(_verb))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit status, and has told any error in one line on standard error.

    argv: without the program's name; None takes it from the process.
    """
    argv = sys.argv[1:] if argv is None else [*argv]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where there is no × or →, better a ? than no table
    try:
        with stoppable():
            command = shlex.join(["martlet", *argv])
            status = get_command(app).main(argv, "martlet", standalone_mode=False, obj=command)
            sys.stdout.flush()
            return status or 0
    except Stopped as stopped:
        return _fail(str(stopped), stopped.exit_status)
    except BrokenPipeError:
        # Who reads has gone; nothing is left to say, and nowhere to say what Python still holds.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MartletError as error:
        return _fail(str(error), error.exit_status, error)
    except typer.TyperException as error:
        verb = getattr(getattr(error, "ctx", None), "command_path", "martlet")
        return _fail(f"{error.format_message()} (see: {verb} --help)", error.exit_code, error)
    except Exception as error:  # noqa: BLE001 - the last to catch one, and tells it
        hint = "" if DEBUG in os.environ else f"; run again with {DEBUG}=1 for the traceback"
        return _fail(f"{type(error).__name__}: {error}{hint}", 1, error)


def _fail(message: str, status: int, error: Exception | None = None) -> int:
    if error is not None and DEBUG in os.environ:
        traceback.print_exception(error)
    print(f"martlet: {one_line(message)}", file=sys.stderr)
    return status
