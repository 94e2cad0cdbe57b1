"""What an engine is: it lowers a model to files, opens them, runs them, and says what it really ran."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from martlet.core.errors import EngineError
from martlet.core.technique import Int8Form

if TYPE_CHECKING:
    from torch import Tensor, nn

    from martlet.core.model import Model

BATCH = "batch"
"""What the dynamic dimension is called in files that have names for it."""
IMAGES, LOGITS = "images", "logits"
"""What goes into a model and comes out of it."""
WHOLE = "model"
"""What the files of a model are called that is one graph."""


class Piece(NamedTuple):
    """What is written as one graph: a whole model, or a stage of one. All inputs have the images as first dimension.

    model: which it is, or is of. examples: of two images. inputs, outputs: names.
    """

    model: Model
    module: nn.Module
    examples: tuple[Tensor, ...]
    inputs: tuple[str, ...] = (IMAGES,)
    outputs: tuple[str, ...] = (LOGITS,)


def whole(model: Model) -> Piece:
    """A model as one graph from images to logits."""
    import torch

    return Piece(model, model.module, (torch.zeros(2, 3, *model.preprocess.size),))


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation as the engine executed it.

    name: of what it multiplies (`blocks.0.attn.qkv`), else the engine's own name.
    kind: the engine's type (`FullyConnected`).
    precision: `i8`, `bf16`, `f32` …, as the kernel ran it; `unknown` where the engine doesn't tell.
    macs: multiply–accumulates per image.
    attention: they multiply two activations, not an activation and a weight.
    microseconds: mean time per call. A kernel that multiplied in several precisions gives one Op for each, and shares
    its time between them by their MACs.
    sources: names in the model file that were fused into it.
    weights: the type in which its kernel reads the second operand (`i8`, `nf4`, `f32`); empty where the engine doesn't
    tell.
    """

    name: str
    kind: str
    precision: str
    macs: int = 0
    attention: bool = False
    microseconds: float = 0.0
    sources: tuple[str, ...] = ()
    weights: str = ""


class Session(ABC):
    """A model, or a stage of one, compiled for one batch size on one engine.

    exits: of a model that can stop early, the stage (B,) after which each image of the last call left; else None.
    """

    batch: int
    threads: int
    exits: np.ndarray | None = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Runs float32 (B, 3, H, W), B the session's batch, to float32 logits (B, K)."""
        check_images(images, self.batch)
        return np.array(self.run([images])[0], dtype=np.float32)

    @abstractmethod
    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What the graph gives for what it takes. The arrays may be the engine's own, until it runs again."""

    @abstractmethod
    def profile(self, images: np.ndarray | Sequence[np.ndarray], repeats: int = 10) -> list[Op]:
        """What was executed, in order, read from the engine itself. Every MAC of the model is in exactly one Op.

        images: float32 (B, 3, H, W), or all that the graph takes.

        Raises:
            EngineError: the engine's account doesn't add up to the model's MACs.
        """


class Engine(ABC):
    """One inference engine. Subclasses import it only inside methods."""

    name: ClassVar[str]
    extra: ClassVar[str | None] = None
    """The optional dependency to install, if it isn't in the base."""
    int8: ClassVar[Int8Form] = Int8Form()
    integer_kernels: ClassVar[bool] = True
    """False where integers are multiplied as floating point: its rounding is right, and its time means nothing."""
    formats: ClassVar[frozenset[str]] = frozenset()
    """The formats of weights, besides integers, that a kernel of it reads."""
    precisions: ClassVar[tuple[str, ...]] = ("f32",)
    """What it can compute floating-point parts in, on a machine that has all of them."""
    profile_source: ClassVar[str]
    """Where `Session.profile` reads what was executed."""

    @abstractmethod
    def version(self) -> str:
        """The installed version.

        Raises:
            EngineError: not installed; says what to install.
        """

    def alternatives(self) -> tuple[str, ...]:
        """Those of `precisions` that this machine has instructions for."""
        return self.precisions

    def simulates(self, model: Model) -> bool:
        """True if the model is rounded in a way that this engine has no kernels for."""
        return model.simulated or (model.rounded and not self.integer_kernels) or not model.formats <= self.formats

    def lower(self, model: Model, folder: Path) -> list[str]:
        """Writes the engine's files for the model into the folder, for any batch size: those of each stage, if it can
        stop early. Returns their names.

        Raises:
            EngineError: the engine can't take this model or its precision.
        """
        from martlet.engine import staged

        self.check_precision(model.precision)
        return staged.lower(self, model, folder) or self.write(whole(model), folder, WHOLE)

    def open(
        self,
        folder: Path,
        *,
        batch: int = 1,
        precision: str = "f32",
        threads: int | None = None,
        trust_code: bool = False,
    ) -> Session:
        """Compiles the files of `lower` for one batch size. threads: None is every core the process may use.

        trust_code: run the Python file that the model came from, if it came from one and the engine needs it.

        Raises:
            EngineError: the files are missing or refused, or the precision isn't one of this machine's.
            UsageError: the engine needs code that isn't trusted.
        """
        from martlet.engine import staged

        self.check_precision(precision)
        options = precision, threads or cores(), trust_code
        if (folder / staged.POLICY).is_file():
            return staged.StagedSession(self, folder, batch, *options)
        return self.sessions(folder, {WHOLE: [batch]}, *options)[WHOLE][batch]

    @abstractmethod
    def write(self, piece: Piece, folder: Path, stem: str) -> list[str]:
        """Writes the engine's files for one graph, called by the stem. Returns their names."""

    def sessions(
        self, folder: Path, batches: Mapping[str, Sequence[int]], precision: str, threads: int, trust_code: bool
    ) -> dict[str, dict[int, Session]]:
        """Graphs compiled, each for the batch sizes that are asked of its stem."""
        return {
            stem: {batch: self.read(folder, stem, batch, precision, threads) for batch in sizes}
            for stem, sizes in batches.items()
        }

    def read(self, folder: Path, stem: str, batch: int, precision: str, threads: int) -> Session:
        """The files of one graph, compiled for one batch size."""
        raise NotImplementedError(f"{self.name} says neither how it reads files nor which sessions it has")

    def check_precision(self, precision: str) -> None:
        """Raises:
        EngineError: this engine, or this machine, doesn't compute in the precision.
        """
        if precision not in self.precisions:
            raise EngineError(f"{self.name} computes in {' or '.join(self.precisions)}, not in {precision}")
        if precision not in self.alternatives():
            raise EngineError(
                f"this machine has no fast {precision} in {self.name}; it has {', '.join(self.alternatives())}"
            )

    def refuse(self, what: str, cause: Exception) -> EngineError:
        """An EngineError in one line: this engine, what it can't do, and the telling line of the cause."""
        return EngineError(f"{self.name} can't {what}: {first_line(cause)}")


def first_line(cause: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = (line.strip() for line in str(cause).splitlines())
    return next((line for line in lines if line and not line.startswith("Exception from")), type(cause).__name__)


def file_in(folder: Path, name: str) -> Path:
    """The path of an engine's file.

    Raises:
        EngineError: it isn't there.
    """
    path = folder / name
    if not path.is_file():
        raise EngineError(f"{folder} has no {name}; compress the model again for this engine")
    return path


def together(images: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
    """All that a graph takes, if it is the images or a list of more."""
    return [images] if isinstance(images, np.ndarray) else [*images]


def check_images(images: np.ndarray, batch: int) -> None:
    """Raises:
    ValueError: not float32 (batch, 3, H, W). A defect of the caller, since images come from preprocessing.
    """
    if images.dtype != np.float32 or images.ndim != 4 or len(images) != batch:
        raise ValueError(
            f"a session of batch {batch} takes float32 ({batch}, 3, H, W), not {images.dtype} {images.shape}"
        )


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
