import io
import logging
import warnings
from contextlib import redirect_stderr

import pytest
from rich.console import Console

from martlet.cli import terminal


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def xterm(monkeypatch):
    """An ordinary terminal, whatever the machine says."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_one_line_is_one_line_and_obeyed_by_no_terminal():
    assert terminal.one_line("  a\n\tb \r\n c  d\n") == "a b c  d"
    assert terminal.one_line("red \x1b[31m\x07é") == "red �[31m�é"


def test_tables_show_what_is_in_them_and_fold_no_number():
    made = terminal.table(("Name", "MACs"), [["[red]x[/red]" * 20, "12,345 k"], [("two", "lines"), "1"]], ("MACs",))
    console = Console(file=io.StringIO(), width=40)
    console.print(made)
    shown = console.file.getvalue()
    assert "[red]x[/red]" in shown
    assert shown.count("12,345 k") == 1
    assert [line.split()[0] for line in shown.splitlines() if line.strip()][-2:] == ["two", "lines"]


def test_a_long_path_is_not_broken(capsys):
    path = "/a" * 200
    terminal.show(path)
    assert capsys.readouterr().out == f"{path}\n"


def test_json_survives_any_file_name_and_has_no_nan(capsys):
    terminal.emit({"é\udcff": 1.5})
    assert capsys.readouterr().out == '{\n "\\u00e9\\udcff": 1.5\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        terminal.emit({"latency_ms": float("nan")})


@pytest.mark.parametrize("debug", [False, True])
def test_libraries_talk_to_standard_error_if_at_all(debug, capsys, caplog, monkeypatch):
    monkeypatch.setenv("MARTLET_DEBUG", "1") if debug else monkeypatch.delenv("MARTLET_DEBUG", raising=False)
    level = logging.root.manager.disable
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        with terminal.working("test"):
            print("printed")
            warnings.warn("warned", stacklevel=1)
            logging.getLogger("library").error("logged")
    assert logging.root.manager.disable == level
    assert (bool(warned), "logged" in caplog.text) == (debug, debug)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "printed\n")


def test_nothing_is_drawn_where_nobody_looks(capsys):
    with terminal.working("load") as progress:
        progress("run images", 1, 2)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_progress_is_drawn_on_a_terminal_and_wiped(xterm, capsys):
    with redirect_stderr(Tty()) as screen, terminal.working("load the model") as progress:
        assert "load the model" in screen.getvalue()
        progress("run images", 12, 24)
        assert "run images" in screen.getvalue()
        assert "50%" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")
    assert capsys.readouterr().out == ""


def test_progress_that_comes_often_is_drawn_seldom(xterm):
    with redirect_stderr(Tty()) as screen, terminal.working("load") as progress:
        before = len(screen.getvalue())
        progress("time", 0, 10_000)
        once = len(screen.getvalue()) - before
        for done in range(1, 1000):
            progress("time", done, 10_000)
        drawn = len(screen.getvalue()) - before - once
    assert once > 0
    assert drawn < 20 * once
