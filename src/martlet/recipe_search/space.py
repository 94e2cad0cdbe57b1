"""Spaces of one technique's settings: a few models timed on the engine tell the time of all, images what each loses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from martlet.core import pipeline
from martlet.core.errors import NumericsError, UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Batches, Context, Progress, Technique, silent

if TYPE_CHECKING:
    from martlet.core.kept import Kept
    from martlet.core.model import Model
    from martlet.data.examples import Examples
    from martlet.engine.base import Engine, Session
    from martlet.recipe_search.record import Record

TIMED_ON = 2
"""Images that models are calibrated on which are timed only."""
SECONDS = 6.0
"""Of timing, at least, for all models that are timed together."""

C = TypeVar("C")


class Loss(NamedTuple):
    """What a candidate loses: the mean KL divergence from the untouched model in nats, and `expected_drop_pct`."""

    kl: float
    drop_pct: float

    @classmethod
    def of(cls, reference: np.ndarray, logits: np.ndarray) -> Loss:
        """Both (images, K).

        Raises:
            NumericsError: NaN or infinity.
        """
        from martlet.measure.fidelity import fidelity

        if not np.isfinite(logits).all():
            raise NumericsError("a model that the search compressed gives NaN or infinity")
        return cls(fidelity(reference, logits)["kl_mean"], expected_drop_pct(reference, logits))


def expected_drop_pct(reference: np.ndarray, logits: np.ndarray) -> float:
    """Points of top-1 to be lost, by the untouched model's own probabilities, without labels; logits (images, K).

    The mean over images of p(its first choice) - p(the other's first choice). Where the untouched model's probabilities
    are right, this is what labels would give on average, with much less chance in it: most first choices that change do
    so where the untouched model wasn't sure.
    """
    return 100 * float(expected_drops(reference, logits).mean())


def expected_drops(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """p(the untouched model's first choice) - p(the other's) of each image, by the untouched model's probabilities."""
    shifted = np.exp(reference.astype(np.float64) - reference.max(1, keepdims=True))
    p = shifted / shifted.sum(1, keepdims=True)
    return p.max(1) - np.take_along_axis(p, logits.argmax(1)[:, None], 1)[:, 0]


def context(engine: Engine, images: Batches | None = None, seed: int = 0, progress: Progress = silent) -> Context:
    """What techniques may use that are compressed for an engine."""
    return Context(
        images=images,
        seed=seed,
        engine=engine.name,
        int8=engine.int8,
        precisions=engine.alternatives(),
        progress=progress,
    )


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What techniques learn from while recipes are searched.

    calibration: images. apart, training, kept: as of a Context.
    """

    calibration: Batches
    apart: Batches | None = None
    training: Examples | None = None
    kept: Kept | None = None

    def context(self, engine: Engine, seed: int, progress: Progress) -> Context:
        """With all of it."""
        found = context(engine, self.calibration, seed, progress)
        return replace(found, apart=self.apart, training=self.training, kept=self.kept)


def front(candidates: Iterable[C], latency_ms: Callable[[C], float], loss: Callable[[C], float]) -> list[C]:
    """Those that no other beats in both, the fastest first."""
    kept: list[C] = []
    for candidate in sorted(candidates, key=lambda c: (latency_ms(c), loss(c))):
        if not kept or loss(candidate) < loss(kept[-1]):
            kept.append(candidate)
    return kept


@dataclass
class Space(ABC, Generic[C]):
    """One technique of a recipe, and the settings of it that a search chooses among.

    A subclass says what a candidate is (`candidate`, `text`), learns from the engine's clock and from images what each
    takes and loses (`time`, `judge`; both skip what is on record), and says which are worth drawing (`front`).

    position: of the technique in the recipe. pool: all images. calibration: those of them that techniques learn from.
    """

    source: Model
    recipe: Recipe
    position: int
    engine: Engine
    pool: Batches
    calibration: Batches
    threads: int | None
    seed: int
    progress: Progress
    record: Record
    losses: dict[Any, Loss] = field(default_factory=dict, init=False)
    """What `judge` has found so far."""

    basis: ClassVar[str]
    """The technique that is measured in place of all that have this space, when whole recipes are searched."""

    @property
    def technique(self) -> Technique:
        return self.recipe.passes[self.position]

    @abstractmethod
    def candidate(self, chosen: C) -> Recipe:
        """The recipe with the technique set so."""

    @abstractmethod
    def text(self, chosen: C) -> str:
        """What it goes by in the record."""

    @abstractmethod
    def time(self) -> None:
        """Times what the latency of all candidates follows from."""

    @abstractmethod
    def judge(self) -> None:
        """Computes on images what candidates lose."""

    @abstractmethod
    def loss(self, chosen: C) -> Loss:
        """As judged."""

    @abstractmethod
    def latency_ms(self, chosen: C) -> float:
        """As predicted."""

    @abstractmethod
    def front(self) -> list[C]:
        """The judged candidates that no other beats in time and in loss, as predicted, the fastest first."""

    def swapped(self, *techniques: Technique) -> Recipe:
        """The recipe with other techniques in the place of the one that is searched."""
        return Recipe((*self.recipe.passes[: self.position], *techniques, *self.recipe.passes[self.position + 1 :]))

    def context(self, images: Batches) -> Context:
        return context(self.engine, images, self.seed, self.progress)

    def compressed(self, chosen: C, images: Batches) -> Model:
        return pipeline.run(self.source, self.candidate(chosen), self.context(images))

    @contextmanager
    def opened(self, models: Mapping[str, Model]) -> Iterator[dict[str, Session]]:
        """Sessions of batch 1.

        Raises:
            UsageError: the engine only simulates them.
        """
        from martlet.deployed import deploy

        with ExitStack() as stack:
            sessions = {}
            for name, model in models.items():
                deployed = stack.enter_context(deploy(model, self.engine.name, progress=self.progress))
                if deployed.simulated:
                    raise UsageError(
                        f"{self.engine.name} only simulates this recipe, so its times say nothing; "
                        "search on openvino or onnxruntime"
                    )
                sessions[name] = deployed.open(1, self.threads)
            yield sessions

    def probe(self) -> np.ndarray:
        """Noise in the shape of an image, (1, 3, H, W)."""
        size = self.source.preprocess.size
        return np.random.default_rng(self.seed).standard_normal((1, 3, *size), dtype=np.float32)

    def times(self, models: Mapping[str, Model]) -> dict[str, float]:
        """Median milliseconds of each, interleaved, at batch 1.

        Raises:
            UsageError: the engine only simulates them.
        """
        with self.opened(models) as sessions:
            return self.turns(sessions)

    def turns(self, sessions: Mapping[str, Session]) -> dict[str, float]:
        """Median milliseconds of each, interleaved."""
        from martlet.measure import latency

        probe = self.probe()
        runs = {name: (lambda session=session: session(probe)) for name, session in sessions.items()}
        found = latency.interleave(runs, seed=self.seed, min_seconds=SECONDS, progress=self.progress)
        return {name: float(np.median(ms)) for name, ms in found.items()}
