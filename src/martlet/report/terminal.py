"""The report in the terminal: the page's before-and-after table, in 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from martlet.core.report import Document
from martlet.report import units, verdict

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


def summary(document: Document) -> RenderableType:
    """The model, the recipe, every number before and after, the alternatives, the fidelity, and the gate's line.

    Nothing in the document is taken for markup or for a control sequence of the terminal.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "Baseline", "Artifact", "Change"):
        table.add_column(heading, overflow="fold")
    for row in verdict.rows(document):
        table.add_row(
            text(row.name),
            _cell(row.baseline, row.detail[0]),
            _cell(f"{row.artifact} (simulated)" if row.simulated else row.artifact, row.detail[1], "bold"),
            text(row.change, "bold red" if row.worse else ""),
        )
    alternatives = [
        text(
            f"{entry['name']}: {units.quantity(entry['latency_ms']['median'], 'ms')}, "
            f"speed-up {verdict.interval(entry['speedup'])}"
        )
        for entry in document["alternatives"]
    ]
    return Group(
        text(document["model"]["name"], "bold"),
        text(f"{document['recipe']['text']}, {verdict.place(document)}", "dim"),
        text(verdict.floats(document), "dim"),
        table,
        *alternatives,
        text(_fidelity(document)),
        text(""),
        *_gate(document),
        *([text(told, "yellow")] if (told := verdict.plainer(document)) else []),
    )


def _fidelity(document: Document) -> str:
    fidelity = document["fidelity"]
    n = fidelity["n_images"]
    agreement = units.percent(fidelity["top1_agreement_pct"], n)
    kl, sqnr = units.quantity(fidelity["kl_mean"], "nats"), units.quantity(fidelity["logit_sqnr_db"], "dB")
    return f"To the original: agreement {agreement}, KL {kl}, logit SQNR {sqnr} (n = {n:,})"


def _gate(document: Document) -> list[Text]:
    if document["gate"]["passed"]:
        return [text(f"{verdict.gate(document)}: {verdict.measured(document)}", "bold green")]
    return [text(verdict.gate(document), "bold red"), text(verdict.measured(document))]


def _cell(value: str, detail: str, style: str = "") -> Text:
    cell = text(value, style)
    return cell.append_text(text(f"\n{detail}", "dim")) if detail else cell


def text(content: str, style: str = "") -> Text:
    """Text that is no markup and holds no control sequence."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else "�" for c in content), style=style)
