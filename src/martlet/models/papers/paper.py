"""What the paper of a family states of its models, kept beside the code, to be checked and to be shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

TOLERANCES = MappingProxyType({"params": 0.01, "macs": 0.03})
"""How far a count may lie from the paper's, relative to it; rounding to the digits that it prints is agreement too."""

UNITS = {"K": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True, kw_only=True)
class Stated:
    """One model's row in its paper, figures as they are printed (`23M`, `4.3G`).

    params, macs: what papers call FLOPs is MACs, per image of the model's own size. None where the paper is silent.
    top1_pct: on ImageNet-1K's validation set, trained on it alone.
    counts_attention: False if the paper's counter can't see the products of two activations.
    image_size: the side of the images that the row is of, if it isn't the model's own.
    fused: True if the row is of the model for inference, its training-time branches and batch norms merged.
    differs: what our count doesn't agree with, and why; a reason for each of `params` and `macs` that it names.
    """

    params: str | None
    macs: str | None
    top1_pct: float | None = None
    counts_attention: bool = True
    image_size: int | None = None
    fused: bool = False
    differs: Mapping[str, str] = field(default_factory=dict)

    def agrees(self, quantity: str, counted: int) -> bool:
        """True if a count of `params` or `macs` is the paper's, within TOLERANCES or to the digits printed.

        Raises:
            ValueError: the paper doesn't state that quantity.
        """
        text: str | None = getattr(self, quantity)
        if text is None:
            raise ValueError(f"the paper states no {quantity}")
        value, last_digit = figure(text)
        return abs(counted - value) <= max(TOLERANCES[quantity] * value, last_digit / 2)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a family comes from.

    code: the authors' implementation, from which nothing but facts is taken; None if there is none.
    license: of that implementation, as an SPDX name; `none` if it states none.
    models: by registered name.
    differs: where our architecture isn't the authors', and why; empty if nothing is known.
    """

    title: str
    authors: str
    year: int
    arxiv: str
    code: str | None
    license: str
    models: Mapping[str, Stated]
    differs: str = ""


def figure(text: str) -> tuple[float, float]:
    """(value, weight of the last digit) of a printed figure: `4.3G` is (4.3e9, 1e8)."""
    digits, unit = text[:-1], UNITS[text[-1]]
    return float(digits) * unit, unit / 10 ** len(digits.partition(".")[2])
