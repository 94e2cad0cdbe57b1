"""What every host library is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from martlet.data.preprocess import Preprocess

PRETRAINED = "pretrained"
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A model as the user asked for it.

    name: what follows the prefix.
    weights: PRETRAINED (the library's own), RANDOM, a file, or None for what is usual with this library.
    num_classes: None for what the library has.
    kwargs: for the library's constructor.
    """

    name: str
    weights: str | None = None
    num_classes: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    trust_code: bool = False

    @property
    def weights_file(self) -> Path | None:
        """The checkpoint to load, if one was named."""
        return None if self.weights in (None, PRETRAINED, RANDOM) else Path(self.weights)

    @property
    def random_weights(self) -> str:
        """What `Loaded.weights` says of weights that nobody trained."""
        return f"random (seed {self.seed})"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model as its library made it.

    module: images (B, 3, H, W) to logits (B, K).
    origin: JSON from which the same file's `rebuild` makes the architecture again, offline.
    weights: where the weights come from, in words.
    preprocess_doubt: why `preprocess` is only an assumption, for the user to confirm; empty if the source states it.
    """

    module: nn.Module
    preprocess: Preprocess
    origin: dict[str, Any]
    weights: str
    class_names: tuple[str, ...] | None = None
    preprocess_doubt: str = ""


def first_line(error: Exception) -> str:
    """What an error of a host library says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
