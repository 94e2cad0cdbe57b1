"""Sizes: parameters, bytes of weights, bytes of files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def params(module: nn.Module) -> int:
    """Weights and biases, whatever type holds them; a shared tensor counts once.

    Integer codes of a quantized weight count as the parameters that they replace; scales and zero points don't count.
    """
    from martlet.nn.quantizers import PackedWeightQuantizer, WeightQuantizer

    holders = [part for part in module.modules() if isinstance(part, WeightQuantizer | PackedWeightQuantizer)]
    return sum(tensor.numel() for tensor in module.parameters()) + sum(prod(part.shape) for part in holders)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of every parameter and saved buffer, each in its own type; a shared tensor counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _saved(module))


def file_bytes(folder: Path, names: Iterable[str]) -> int:
    """Bytes on disk of the files of these names."""
    return sum((folder / name).stat().st_size for name in names)


def _saved(module: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for tensor in module.state_dict(keep_vars=True).values():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor
