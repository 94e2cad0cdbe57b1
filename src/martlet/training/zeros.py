"""Weights that a technique made zero, and that training is to leave so."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from martlet.core.model import Model


def leaves_zeros(model: Model) -> bool:
    """Whether a technique before made weights zero that are to stay so."""
    return any(getattr(step.technique, "leaves_zeros", False) for step in model.steps)


def hold_zeros_(parameters: Iterable[Tensor]) -> None:
    """Keeps weights at zero that are zero, by taking their gradients away: decay and moments then leave them too."""
    for parameter in parameters:
        if parameter.ndim > 1 and bool((gone := parameter.detach() == 0).any()):
            parameter.register_hook(lambda gradient, gone=gone: gradient.masked_fill(gone, 0))
