"""Pages of docs/ made of results, a file each: `page` gives what `PATH` holds, from the newest of `BENCHMARK`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any


def measured_on(entries: Iterable[Mapping[str, Any]]) -> str:
    """A sentence: which machines and versions the entries that carry their own come from, and how many from each."""
    found = Counter(
        f"{its['cpu']} with {its['cores']} core(s), "
        + ", ".join(f"{package} {version}" for package, version in its["versions"].items())
        for its in (entry["environment"] for entry in entries)
    )
    return "Measured on " + "; on ".join(f"{where} ({count})" for where, count in found.most_common()) + "."


def by_part(
    entries: Iterable[Mapping[str, Any]],
    about: Mapping[str, tuple[str, str]],
    shown: Callable[[str, list[Mapping[str, Any]]], Iterable[str]],
) -> Iterator[str]:
    """Lines of each `part` of the entries: its heading and what is told of it, in the order of these; what shows it."""
    ranked = sorted(entries, key=lambda e: [*about].index(e["part"]))
    for part, its in groupby(ranked, key=lambda e: e["part"]):
        heading, told = about[part]
        yield from ("", f"## {heading}", "", told, "", *shown(part, list(its)))


def interval(ratio: Mapping[str, float] | None) -> str:
    """A ratio of times with its interval, if it was measured."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else "–"


def spread(values: Sequence[float]) -> str:
    """Their mean, and the range where there are several."""
    found = f"{fmean(values):.1f}"
    return found if len(values) == 1 else f"{found} ({min(values):.1f} to {max(values):.1f})"
