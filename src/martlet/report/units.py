"""Numbers as people read them, each with its unit. What was not measured says so, and is never a zero."""

from __future__ import annotations

import math

MISSING = "not measured"
SAME = 0.005
"""Two numbers that differ by less than this fraction are called the same."""


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, thousands apart: 6.87, 104, 12,500, 0.0031."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(digits - 1 - math.floor(math.log10(abs(rounded))), 0)
    return f"{value:,.{decimals}f}".replace("-", "−")


def quantity(value: float | None, unit: str, digits: int = 3) -> str:
    """A number and its unit, a space between."""
    return MISSING if value is None else f"{number(value, digits)} {unit}"


def size(value: float | None) -> str:
    """Bytes in decimal units: 1 MB is 1,000,000 bytes."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def count(value: float | None) -> str:
    """A large count: 5.72 M."""
    return _scaled(value, ("", "k", "M", "G", "T")).rstrip()


def duration(seconds: float | None) -> str:
    """`0.412 s`, `41.2 s`, `3 min 12 s`."""
    if seconds is None or seconds < 60:
        return quantity(seconds, "s")
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest} s"


def pct(value: float | None, n: int = 0) -> str:
    """A percentage without its sign, to a tenth; to a hundredth from 10,000 images on, where that means something."""
    if value is None:
        return MISSING
    return f"{value:.{pct_decimals(n)}f}"


def percent(value: float | None, n: int = 0) -> str:
    """`pct` with its sign."""
    return MISSING if value is None else f"{pct(value, n)} %"


def points(before: float, after: float, n: int = 0) -> str:
    """The signed difference of two percentages, or that there is none at this resolution."""
    change = round(after - before, pct_decimals(n))
    return f"{change:+.{pct_decimals(n)}f} points".replace("-", "−") if change else "no change"


def pct_decimals(n: int) -> int:
    """Decimals that a percentage of n images deserves."""
    return 2 if n >= 10_000 else 1


def times(ratio: float) -> str:
    """`2.1×`, `1.04×`, `12×`."""
    decimals = 0 if ratio >= 9.95 else 1 if ratio >= 1.095 else 2
    return f"{ratio:.{decimals}f}×"


def compared(before: float, after: float, less: str, more: str, same: str) -> str:
    """`3.9× smaller` from the words for less, more and the same."""
    if before == after or (before > 0 and abs(after / before - 1) < SAME):
        return same
    if before <= 0 or after <= 0:
        return f"{number(before)} → {number(after)}"
    return f"{times(before / after)} {less}" if after < before else f"{times(after / before)} {more}"


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return MISSING
    if abs(value) < 1000 and value == int(value):
        return f"{value:.0f} {units[0]}"
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{number(value)} {units[power]}"
