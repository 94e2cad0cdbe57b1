"""What a block takes on an engine, by its sizes: a law fitted to blocks that were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from martlet.core import report
from martlet.core.errors import RecipeError
from martlet.vit.structure import BlockShape

MAX_ERROR = 0.1
"""Of a measured block's latency, that the law may miss."""


@dataclass(frozen=True, eq=False)
class LatencyLaw:
    """latency_ms = c · (1, H, H D, H E, U), with H heads of D dimensions of q and k and E of v, and U hidden units."""

    coefficients: Tensor

    def __call__(self, shape: BlockShape) -> float:
        return float(self.coefficients @ _terms(shape))


def _terms(shape: BlockShape) -> Tensor:
    heads = shape.num_heads
    return torch.tensor([1, heads, heads * shape.qk_dim, heads * shape.v_dim, shape.hidden], dtype=torch.float64)


def fit_law(rows: Sequence[Mapping[str, Any]]) -> LatencyLaw:
    """Least squares of relative errors. rows: num_heads, qk_dim, v_dim, hidden and latency_ms of measured blocks.

    Raises:
        RecipeError: too few rows, or some that the law misses by more than MAX_ERROR.
    """
    shapes = [BlockShape(*(int(row[name]) for name in ("num_heads", "qk_dim", "v_dim", "hidden"))) for row in rows]
    terms = torch.stack([_terms(shape) for shape in shapes]) if shapes else torch.zeros(0, 5, dtype=torch.float64)
    if torch.linalg.matrix_rank(terms) < terms.shape[1]:
        raise RecipeError(f"a latency table needs blocks that differ in every size; this one has {len(rows)} rows")
    times = torch.tensor([float(row["latency_ms"]) for row in rows], dtype=torch.float64)
    found = torch.linalg.lstsq(terms / times[:, None], torch.ones(len(rows), 1, dtype=torch.float64)).solution[:, 0]
    errors = (terms @ found / times - 1).abs()
    if float(errors.max()) > MAX_ERROR:
        worst = rows[int(errors.argmax())]
        raise RecipeError(
            f"the latency table doesn't hold together: the block of {worst['latency_ms']:g} ms is missed by "
            f"{float(errors.max()):.0%}; measure it again on a quiet machine"
        )
    return LatencyLaw(found)


def read_law(path: str, technique: str, engine: str) -> LatencyLaw:
    """Of a table that `benchmarks/prune.py --parts table` has measured.

    Raises:
        RecipeError: it can't be read, or was measured on another engine or machine.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        machine, rows = (table["engine"], table["cpu"]), table["blocks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{technique}: {path} is no latency table ({type(error).__name__}); "
            "benchmarks/prune.py --parts table makes one"
        ) from None
    here = (engine, report.environment()["cpu"])
    for what, theirs, ours in zip(("engine", "machine"), machine, here, strict=True):
        if theirs != ours:
            raise RecipeError(f"{technique}: {path} was measured on another {what}: {theirs}, and this is {ours}")
    return fit_law(rows)
