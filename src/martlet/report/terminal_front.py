"""The front of a search in the terminal: the page's chart in characters, and the front as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from martlet.report import pareto, terminal
from martlet.report.charts import ticks

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

    from martlet.report.pareto import Axis, Document, Point

MARKS = {"front": ("●", "blue"), "beaten": ("·", ""), "reference": ("■", ""), "peer": ("▲", "yellow")}
WINNER, SIMULATED = ("★", "bold green"), ("○", "magenta")
MARGIN = 9
"""Columns for the numbers of the axis that goes up."""
MIN_COLUMNS = 24
"""Of the chart; a narrower terminal shows the table alone."""


class Front:
    """What Rich prints, as wide as the console is. x, y: keys of axes; by default what the page shows first."""

    def __init__(self, document: Document, x: str | None = None, y: str | None = None, rows: int = 16) -> None:
        """
        Raises:
            KeyError: the document has no such axis.
        """
        by_key = {axis.key: axis for axis in pareto.axes(document)}
        first = pareto.chosen([*by_key.values()])
        self.document, self.rows = document, rows
        self.x, self.y = by_key[x] if x else first[0], by_key[y] if y else first[1]
        self.front = pareto.front(document, self.x, self.y)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= MARGIN + MIN_COLUMNS and self._framed():
            yield from self._chart(options.max_width - MARGIN - 1)
        yield self._table()
        for line in (pareto.volume(self.document), *pareto.left_out(self.document)):
            if line:
                yield terminal.text(line)

    def _framed(self) -> list[Point]:
        """As the page: the front, references, peers and the winner; what lies outside their frame isn't drawn."""
        known = [p for p in self.document["points"] if None not in (self.x.value(p), self.y.value(p))]
        kept = [p for p in known if p in self.front or p["kind"] != "candidate" or p["winner"]]
        return kept if self.front else known

    def _chart(self, columns: int) -> RenderResult:
        from rich.text import Text

        limits = pareto.limits(self.document)
        framed = self._framed()
        (left, right), (bottom, top) = (_range(a, framed, limits.get(a.key)) for a in (self.x, self.y))

        def column(value: float) -> int:
            return round((columns - 1) * (value - left) / (right - left))

        def row(value: float) -> int:
            return round((self.rows - 1) * (top - value) / (top - bottom))

        grid = [[(" ", "")] * columns for _ in range(self.rows)]
        if self.x.key in limits:
            for line in grid:
                line[column(limits[self.x.key])] = ("┊", "red")
        if self.y.key in limits:
            grid[row(limits[self.y.key])] = [("┄", "red")] * columns
        outside = 0
        for point in sorted(self.document["points"], key=self._weight):
            x, y = self.x.value(point), self.y.value(point)
            if x is None or y is None:
                continue
            if left <= x <= right and bottom <= y <= top:
                grid[row(y)][column(x)] = self._mark(point)
            else:
                outside += 1
        yield terminal.text(f"{self.y.label}, {self.y.unit}; {self.y.better} is better", "bold")
        numbers = {row(value): f"{value:g}" for value in ticks(bottom, top, 4)}
        for i, line in enumerate(grid):
            yield Text(f"{numbers.get(i, ''):>{MARGIN - 2}} │", style="dim").append_text(Text.assemble(*line))
        below = [" "] * columns
        for value in ticks(left, right, max(columns // 14, 2)):
            shown = f"{value:g}"
            at = min(max(column(value) - len(shown) // 2, 0), columns - len(shown))
            below[at : at + len(shown)] = shown
        yield Text(" " * (MARGIN - 1) + "└" + "─" * columns, style="dim")
        yield Text(" " * MARGIN + "".join(below).rstrip(), style="dim")
        yield terminal.text(f"{self.x.label}, {self.x.unit}; {self.x.better} is better".rjust(MARGIN + columns), "bold")
        yield terminal.text(self._legend(limits, outside), "dim")

    def _legend(self, limits: Iterable[str], outside: int) -> str:
        marks = {"winner": WINNER, **MARKS, "simulated": SIMULATED}
        words = [f"{mark} {name}" for name, (mark, _) in marks.items()]
        words += ["┄ ┊ budget"] if {self.x.key, self.y.key} & {*limits} else []
        words += [f"{outside} outside"] if outside else []
        return "   ".join(words)

    def _weight(self, point: Point) -> int:
        """What matters most is drawn last, on top."""
        return 4 * point["winner"] + 2 * (point["kind"] != "candidate") + (point in self.front)

    def _mark(self, point: Point) -> tuple[str, str]:
        if point["simulated"]:
            return SIMULATED
        if point["winner"]:
            return WINNER
        return MARKS[point["kind"] if point["kind"] != "candidate" else "front" if point in self.front else "beaten"]

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", overflow="fold")
        shown = [self.x, self.y]
        for axis in shown:
            table.add_column(axis.label, overflow="fold")
        others = [p for p in self.document["points"] if p["kind"] != "candidate"]
        for point in [*self.front, *others]:
            mark, style = self._mark(point)
            name = f"{mark} {point['label']}{' (simulated)' if point['simulated'] else ''}"
            cells = [terminal.text(axis.text(point)) for axis in shown]
            table.add_row(terminal.text(name, style if point["winner"] else ""), *cells)
        return table


def _range(axis: Axis, points: list[Point], limit: float | None) -> tuple[float, float]:
    values = [value for p in points if (value := axis.value(p)) is not None]
    values += [] if limit is None else [limit]
    room = 0.06 * (max(values) - min(values)) or 0.06 * abs(values[0]) or 1.0
    return min(values) - room, max(values) + room
