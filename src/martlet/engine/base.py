"""What an engine is: it lowers a model to files, opens them, runs them, and says what it really ran."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from martlet.core.technique import Int8Form

if TYPE_CHECKING:
    from martlet.core.model import Model


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation as the engine executed it.

    name: the engine's; kind: its type (`FullyConnected`); precision: `i8`, `bf16`, `f32` …, as the kernel ran it.
    macs: multiply–accumulates per image; microseconds: mean time per call; sources: names in the model file that were
    fused into it.
    """

    name: str
    kind: str
    precision: str
    macs: int = 0
    microseconds: float = 0.0
    sources: tuple[str, ...] = ()


class Session(ABC):
    """A model compiled for one batch size on one engine."""

    batch: int
    threads: int

    @abstractmethod
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Runs float32 (B, 3, H, W), B the session's batch, to float32 logits (B, K)."""

    @abstractmethod
    def profile(self, images: np.ndarray, repeats: int = 10) -> list[Op]:
        """What was executed, in order, read from the engine itself."""


class Engine(ABC):
    """One inference engine. Subclasses import it only inside methods."""

    name: ClassVar[str]
    extra: ClassVar[str | None] = None
    """The optional dependency to install, if it isn't in the base."""
    int8: ClassVar[Int8Form] = Int8Form()
    precisions: ClassVar[tuple[str, ...]] = ("f32",)

    @abstractmethod
    def version(self) -> str:
        """The installed version.

        Raises:
            EngineError: not installed; says what to install.
        """

    @abstractmethod
    def lower(self, model: Model, folder: Path) -> list[str]:
        """Writes the engine's files for the model into the folder, for any batch size. Returns their names.

        Raises:
            EngineError: the engine can't take this model or its precision.
        """

    @abstractmethod
    def open(self, folder: Path, *, batch: int = 1, precision: str = "f32", threads: int | None = None) -> Session:
        """Compiles the files of `lower` for one batch size. threads: None is every core the process may use.

        Raises:
            EngineError: the files are missing or refused, or the precision isn't one of this machine's.
        """
