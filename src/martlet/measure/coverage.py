"""Op coverage: how much of the work the engine really ran in each precision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from martlet.core.report import Coverage
from martlet.engine.base import Op


def coverage(ops: Sequence[Op], source: str) -> Coverage:
    """Sums what `Session.profile` read. source: where it was read. Operations come with the slowest first."""
    return {
        "macs_pct": _share((op.precision, op.macs) for op in ops),
        "attention_macs_pct": _share((op.precision, op.macs) for op in ops if op.attention),
        "time_pct": _share((op.precision, op.microseconds) for op in ops),
        "source": source,
        "ops": [
            {
                "name": op.name,
                "kind": op.kind,
                "precision": op.precision,
                "gmacs": op.macs / 1e9,
                "microseconds": op.microseconds,
            }
            for op in sorted(ops, key=lambda op: -op.microseconds)
        ],
    }


def _share(amounts: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Per cent of the whole, largest first; precisions with nothing are left out. Empty if there is nothing at all."""
    total: defaultdict[str, float] = defaultdict(float)
    for precision, amount in amounts:
        total[precision] += amount
    whole = sum(total.values())
    return {p: 100 * a / whole for p, a in sorted(total.items(), key=lambda item: -item[1]) if a}
