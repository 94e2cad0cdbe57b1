import os
import subprocess
import sys

import pytest

from martlet.cli import app, main

HEAVY = [
    *("PIL", "jinja2", "jaxtyping", "mlxtend", "numpy", "onnx", "onnxruntime", "onnxscript", "openvino", "psutil"),
    *("pyarrow", "safetensors", "timm", "torch", "torchvision", "transformers", "yaml"),
]
RUN = [sys.executable, "-c", "import sys; from martlet.cli import main; sys.exit(main())"]


@pytest.fixture
def broken(monkeypatch):
    """`martlet list techniques` meets a defect."""

    def listing():
        raise ZeroDivisionError("division\n by zero")

    monkeypatch.setattr("martlet.cli.list.techniques", listing)
    monkeypatch.delenv("MARTLET_DEBUG", raising=False)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom martlet.cli import main\nmain(['--help'])\nmain(['compress', '--help'])\n"
        f"print('IMPORTED', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["IMPORTED"]
    assert "compress" in done.stdout


def test_help_is_quick():
    """Half a second of a quiet processor's time, and up to twice that where others share its caches."""
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([*RUN, "--help"], capture_output=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 1.0


def test_every_verb_has_help(capsys):
    for command in app.registered_commands:
        assert main([str(command.name), "--help"]) == 0
        shown = capsys.readouterr()
        assert f"martlet {command.name}" in shown.out
        assert shown.err == ""


def test_the_version(capsys):
    import martlet

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"martlet {martlet.__version__}\n"


def test_a_defect_is_one_line_that_says_how_to_see_more(broken, capsys):
    assert main(["list", "techniques"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    expected = "ZeroDivisionError: division by zero; run again with MARTLET_DEBUG=1 for the traceback"
    assert shown.err == f"martlet: {expected}\n"


def test_debugging_shows_the_traceback(broken, capsys, monkeypatch):
    monkeypatch.setenv("MARTLET_DEBUG", "1")
    assert main(["list", "techniques"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("martlet: ZeroDivisionError: division by zero\n")


def test_a_usage_error_points_to_the_verbs_help(capsys):
    assert main(["eval", "--imagess"]) == 2
    assert capsys.readouterr().err.endswith("(see: martlet eval --help)\n")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*RUN, "list", "techniques"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_terminal_of_few_letters_gets_the_table_too():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*RUN, "list", "recipes"], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"int8-f32" in done.stdout
