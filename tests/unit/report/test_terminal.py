import io

import pytest
import sample
from rich.console import Console

from martlet.core.report import Document
from martlet.report.terminal import summary


def printed(document: Document, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(summary(document))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", sample.ALL)
def test_fits_80_columns_and_cuts_nothing(make: sample.Callable[[], Document]) -> None:
    text = printed(make())
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "Latency, median" in text


def test_ends_with_the_gate() -> None:
    assert "Floating-point parts run in f32" in printed(sample.document())
    assert "Gate passed: 2.1× faster, 3.9× smaller" in printed(sample.document())
    assert "The gate failed: 1.3× slower than the baseline" in printed(sample.failed())
    assert "Gate" not in printed(sample.failed())


def test_simulated_and_missing_are_said() -> None:
    text = printed(sample.simulated())
    assert "6.93 ms (simulated)" in text
    assert "faster" not in text
    assert "Gate passed (speed was not judged" in text
    assert "not measured" in printed(sample.bare())


def test_names_are_neither_markup_nor_control_sequences() -> None:
    document = sample.document()
    document["model"]["name"] = "[bold]x[/bold]\x1b[2J\x07"
    text = printed(document)
    assert "[bold]x[/bold]" in text
    assert "\x1b" not in text
    assert "\x07" not in text
