"""Latency of a recipe from its work, by the models that were timed so far.

t = a + b · MACs in float32 + c · MACs in bfloat16 + d · MACs in int8, none of them negative: what each takes on this
engine and machine follows from a handful of models. It knows no technique, so that it serves each that changes work.
Without models that tell a from the rest, time goes with the work: the noise of two that work alike must not say that
work costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from martlet.core.technique import PRECISIONS

RIDGE = 1e-3
"""Of a coefficient against the relative errors, so that few models don't make one infinite."""
FIXED_RIDGE = 0.15
"""The same of what doesn't go with the work. Half of the time is believed for errors of 5 % that it mends."""


class Clock:
    """Fitted by non-negative least squares of relative errors."""

    def __init__(self, timed: Iterable[tuple[Mapping[str, Any], float]]) -> None:
        """timed: work, as `features` takes it, and milliseconds; one at least."""
        from scipy.optimize import nnls

        pairs = [(features(work), ms) for work, ms in timed]
        rows = np.array([row for row, _ in pairs])
        ms = np.array([value for _, value in pairs])
        self._scale = np.maximum(rows.max(0), 1e-12)
        relative = rows / self._scale / ms[:, None]
        ridge = np.diag([FIXED_RIDGE, *[RIDGE] * (rows.shape[1] - 1)]) / ms.mean()
        ridge[rows.max(0) == 0] = 0
        self._coefficients = nnls(np.vstack([relative, ridge]), np.append(np.ones(len(ms)), np.zeros(len(ridge))))[0]
        unseen = [i for i, row in enumerate(rows.max(0)) if row == 0]
        # What no timed model does is taken for as slow as float32.
        per_mac = self._coefficients / self._scale
        per_mac[unseen] = per_mac[1]
        self._per_mac = per_mac

    def latency_ms(self, work: Mapping[str, Any]) -> float:
        return float(features(work) @ self._per_mac)


def features(work: Mapping[str, Any]) -> np.ndarray:
    """1, and MACs in each of PRECISIONS and in int8.

    work: `integer_macs`, `float_macs`, and `precision`, of the floating-point parts.
    """
    floating = [work["float_macs"] * (work["precision"] == precision) for precision in PRECISIONS]
    return np.array([1.0, *floating, work["integer_macs"]], dtype=np.float64)
