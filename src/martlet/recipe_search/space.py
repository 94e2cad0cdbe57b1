"""What all spaces share: candidates are compressed, timed and run on the engine, until one keeps the budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from martlet.core import pipeline
from martlet.core.errors import NumericsError, UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Batches, Context, Progress, Technique

if TYPE_CHECKING:
    import torch

    from martlet.core.model import Model
    from martlet.engine.base import Engine, Session
    from martlet.recipe_search.record import Record

TRIES = 4
"""How many candidates are compressed for good, before more are chosen by what these showed."""
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
    shifted = np.exp(reference.astype(np.float64) - reference.max(1, keepdims=True))
    p = shifted / shifted.sum(1, keepdims=True)
    lost = p.max(1) - np.take_along_axis(p, logits.argmax(1)[:, None], 1)[:, 0]
    return 100 * float(lost.mean())


@dataclass(frozen=True)
class Budget:
    """Points of top-1 that may be lost, or milliseconds that a call may take; the other is to be small."""

    max_drop: float | None
    max_ms: float | None

    @classmethod
    def of(cls, max_drop: float | None, max_ms: float | None) -> Budget:
        """Raises:
        UsageError: none of them, or both.
        """
        if (max_drop is None) == (max_ms is None):
            raise UsageError("a search needs one budget: max_drop in points of top-1, or max_ms in milliseconds")
        return cls(max_drop, max_ms)

    def keeps(self, entry: Mapping[str, float]) -> bool:
        """Whether what was measured is within it."""
        return entry["drop_pct"] <= self.max_drop if self.max_drop is not None else entry["latency_ms"] <= self._ms

    def price(self, entry: Mapping[str, float]) -> float:
        """What is to be small of those that are within it."""
        return entry["latency_ms"] if self.max_drop is not None else entry["kl"]

    def choose(
        self, front: Sequence[C], latency_ms: Callable[[C], float], drop_pct: Callable[[C], float], margin: float = 0.0
    ) -> list[C]:
        """Those that should keep it, the most promising first.

        front: the fastest first, and the most faithful last. margin: of the latency, by which a prediction may be off.
        """
        if self.max_drop is not None:
            return [c for c in front if drop_pct(c) <= self.max_drop]
        return [c for c in reversed(front) if latency_ms(c) <= self._ms * (1 + margin)]

    @property
    def wish(self) -> str:
        return f"at most {self.max_drop:g} points lost" if self.max_drop is not None else f"at most {self._ms:g} ms"

    def __str__(self) -> str:
        return f"a drop of {self.max_drop:g} points" if self.max_drop is not None else f"{self._ms:g} ms"

    @property
    def _ms(self) -> float:
        return self.max_ms or 0.0


class First:
    """The first n of calibration images, those before `skipped` left out."""

    def __init__(self, images: Batches, n: int, skipped: int = 0) -> None:
        self._images, self._skipped = images, skipped
        self.num_images = min(n, images.num_images - skipped)

    def __iter__(self) -> Iterator[torch.Tensor]:
        skip, left = self._skipped, self.num_images
        for batch in self._images:
            if len(part := batch[skip:][:left]):
                yield part
            skip, left = max(0, skip - len(batch)), left - len(part)


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
    takes and loses (`time`, `judge`; both skip what is on record), and names the promising ones for a budget.

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

    noun: ClassVar[str]
    """What a candidate is to a user: `schedule`."""
    references: ClassVar[Mapping[str, Any]]
    """Candidates that the found one is compared with, by what is said of them: `with all tokens`."""

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
    def describe(self, text: str) -> str:
        """The same for a user: `4: 64 removed`."""

    @abstractmethod
    def time(self) -> None:
        """Times what the latency of all candidates follows from."""

    @abstractmethod
    def judge(self) -> None:
        """Computes on images what candidates lose."""

    @abstractmethod
    def latency_ms(self, chosen: C) -> float:
        """As predicted."""

    @abstractmethod
    def promising(self, budget: Budget) -> Iterator[Sequence[C]]:
        """Candidates to be compressed for good, in groups that are timed together; asked for one group at a time."""

    def swapped(self, *techniques: Technique) -> Recipe:
        """The recipe with other techniques in the place of the one that is searched."""
        return Recipe((*self.recipe.passes[: self.position], *techniques, *self.recipe.passes[self.position + 1 :]))

    def context(self, images: Batches) -> Context:
        return Context(
            images=images,
            seed=self.seed,
            engine=self.engine.name,
            int8=self.engine.int8,
            precisions=self.engine.alternatives(),
            progress=self.progress,
        )

    def compressed(self, chosen: C, images: Batches) -> Model:
        return pipeline.run(self.source, self.candidate(chosen), self.context(images))

    @contextmanager
    def opened(self, models: Mapping[str, Model]) -> Iterator[dict[str, Session]]:
        """Sessions of batch 1.

        Raises:
            UsageError: the engine only simulates them.
        """
        from martlet.job import deploy

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

    def verify(self, budget: Budget) -> C:
        """Compresses the most promising for good, and takes the best that keeps the budget on the engine.

        Raises:
            UsageError: none does.
        """
        known = self.record.data.setdefault("measured", {})
        for group in self.promising(budget):
            self.measure([*self.references.values(), *group])
            if kept := [c for c in group if budget.keeps(known[self.text(c)])]:
                return min(kept, key=lambda c: budget.price(known[self.text(c)]))
        self.measure([*self.references.values()])
        told = "; ".join(
            f"{self.describe(text)}: {entry['latency_ms']:.2f} ms, {entry['drop_pct']:.2f} points"
            for text, entry in known.items()
        )
        raise UsageError(f"no {self.noun} that was compressed keeps {budget} ({told}); allow more")

    def measure(self, wanted: Sequence[C]) -> None:
        """Times and losses on the engine of those that aren't on record, compressed with all calibration images."""
        known = self.record.data.setdefault("measured", {})
        fresh = {text: c for c in wanted if (text := self.text(c)) not in known}
        if not fresh:
            return
        models = {}
        for i, (text, chosen) in enumerate(fresh.items()):
            self.progress(f"compress with {self.describe(text)}", i, len(fresh))
            models[text] = self.compressed(chosen, self.calibration)
        times = self.times(models)
        for text, chosen in fresh.items():
            loss = self._loss(models[text])
            known[text] = {
                "latency_ms": times[text],
                "predicted_ms": self.latency_ms(chosen),
                **loss._asdict(),
            }
        self.record.save()

    def _loss(self, model: Model) -> Loss:
        """Of a compressed model against the untouched one, on all images, run by the engine."""
        import torch

        from martlet.job import deploy

        reference, logits = list[np.ndarray](), list[np.ndarray]()
        with deploy(model, self.engine.name, progress=self.progress) as deployed, torch.inference_mode():
            session = deployed.open(1, self.threads)
            for images in self.pool:
                reference.append(self.source.module(images).numpy())
                logits += [session(image[None]) for image in images.numpy()]
                self.progress("run images", len(logits), self.pool.num_images)
        return Loss.of(np.concatenate(reference), np.concatenate(logits))
