"""Models that can stop early, as files of an engine for each stage, and the policy that says which images go on."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from martlet.core.errors import ArtifactError
from martlet.engine.base import IMAGES, Engine, Op, Piece, Session, check_images, together

if TYPE_CHECKING:
    from martlet.core.model import Model

POLICY, VERSION = "policy.json", 1


class Step(NamedTuple):
    """A stage in the policy. stem: of its files. inputs, outputs: names of values.

    low, high: images go on whose confidence is at least low and less than high; both infinite in the last stage.
    macs: what an image has cost that leaves here, all stages before included.
    """

    stem: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    low: float
    high: float
    macs: int


def lower(engine: Engine, model: Model, folder: Path) -> list[str]:
    """Writes each stage and the policy. Returns the files' names; none, if the model can't stop early.

    Stages after an exit that no image passes aren't written: that is the cap on what an image can cost.
    """
    import torch
    from torch.fx import GraphModule

    from martlet.graph.stages import cumulative_macs, leaves, run, stages, window
    from martlet.graph.trace import trace
    from martlet.nn.exits import has_exits

    if not has_exits(model.module):
        return []
    size = model.preprocess.size
    module = model.module if isinstance(model.module, GraphModule) else trace(model.module, size)
    windows = [tuple(window(module, each).tolist()) for each in leaves(module)]
    parts = stages(module)
    count = next((k for k, (low, high) in enumerate(windows, 1) if low >= high), len(parts))
    macs = cumulative_macs(parts, size)
    with torch.no_grad():
        values = {IMAGES: torch.zeros(2, 3, *size)}
        for given in run(parts, values[IMAGES]):
            values |= given
    steps, files = [], []
    for k, part in enumerate(parts[:count]):
        stem = f"stage{k + 1}"
        examples = tuple(values[name] for name in part.inputs)
        files += engine.write(Piece(model, part.module, examples, part.inputs, part.outputs), folder, stem)
        low, high = windows[k] if k < count - 1 else (-math.inf, math.inf)
        steps.append(Step(stem, part.inputs, part.outputs, low, high, macs[k]))
    write_policy(folder, steps)
    return [*files, POLICY]


def write_policy(folder: Path, steps: Sequence[Step]) -> None:
    """Infinite bounds are written as null."""
    data = {
        "martlet_policy": VERSION,
        "max_macs": steps[-1].macs,
        "stages": [
            {**step._asdict(), **{side: _number(getattr(step, side)) for side in ("low", "high")}} for step in steps
        ],
    }
    (folder / POLICY).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_policy(folder: Path) -> list[Step]:
    """Raises:
    ArtifactError: it isn't one that this version reads, or its windows or costs are out of order.
    """
    path = folder / POLICY
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ArtifactError(f"{path} is damaged: it is not JSON") from None
    version = data.get("martlet_policy") if isinstance(data, dict) else None
    if version != VERSION:
        raise ArtifactError(f"{path} is a policy of version {version}; this Martlet reads version {VERSION}")
    try:
        steps = [
            Step(
                str(each["stem"]),
                tuple(each["inputs"]),
                tuple(each["outputs"]),
                -math.inf if each["low"] is None else float(each["low"]),
                math.inf if each["high"] is None else float(each["high"]),
                int(each["macs"]),
            )
            for each in data["stages"]
        ]
        cap = int(data["max_macs"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error!r}") from None
    for k, step in enumerate(steps, 1):
        if Path(step.stem).name != step.stem:
            raise ArtifactError(f"{path} names a file outside the artifact: {step.stem!r}")
        if not step.low <= step.high:
            raise ArtifactError(
                f"{path}: the window of stage {k} is out of order, from {step.low:g} to {step.high:g}; "
                "put the lower confidence first"
            )
    costs = [step.macs for step in steps]
    if not costs or costs != sorted(costs) or costs[-1] > cap:
        raise ArtifactError(f"{path}: stages that cost {costs} MACs don't rise to the {cap} that an image may cost")
    return steps


class StagedSession(Session):
    """Stages that run one after the other, each on the images that are left.

    The batch of the first is the session's. A later stage is compiled for all powers of two up to that, and what is
    left runs in as few parts as these allow, so that no image is computed that needn't be.

    leaving: False lets none leave, which is what an image can cost at most.
    """

    leaving: bool = True

    def __init__(
        self, engine: Engine, folder: Path, batch: int, precision: str, threads: int, trust_code: bool
    ) -> None:
        self.batch, self.threads, self.steps = batch, threads, read_policy(folder)
        sizes = {*(2**i for i in range(batch.bit_length())), batch}
        batches = {step.stem: sorted(sizes, reverse=True) if k else [batch] for k, step in enumerate(self.steps)}
        found = engine.sessions(folder, batches, precision, threads, trust_code)
        self._sessions = [found[step.stem] for step in self.steps]
        # after each stage, the values that a later one takes
        self._kept = [
            frozenset(name for step in self.steps[k + 1 :] for name in step.inputs) for k in range(len(self.steps))
        ]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        [images] = inputs
        values: dict[str, np.ndarray] = {IMAGES: images}
        rows, last = np.arange(len(images)), len(self.steps) - 1
        self.exits, result = np.full(len(images), last), None
        for k, step in enumerate(self.steps):
            found = self._stage(k, [values[name] for name in step.inputs])
            values |= zip(step.outputs, found, strict=True)
            logits = found[0]
            if k == last and result is None:
                return [logits]
            stays = np.zeros(len(rows), bool) if k == last else (step.low <= found[1]) & (found[1] < step.high)
            if stays.all() or (k < last and not self.leaving):
                continue
            if result is None:
                result = np.empty((len(images), logits.shape[1]), np.float32)
            result[rows[~stays]], self.exits[rows[~stays]] = logits[~stays], k
            if not stays.any():
                break
            rows = rows[stays]
            values = {name: values[name][stays] for name in self._kept[k] if name in values}
        assert result is not None
        return [result]

    def profile(self, images: np.ndarray | Sequence[np.ndarray], repeats: int = 10) -> list[Op]:
        """Every stage, as if no image left."""
        return [op for ops in self.profiles(images, repeats) for op in ops]

    def profiles(self, images: np.ndarray | Sequence[np.ndarray], repeats: int = 10) -> list[list[Op]]:
        """Of each stage, as if no image left."""
        [images] = together(images)
        inputs = self._inputs(images)
        return [stage.profile(values, repeats) for stage, values in zip(self.stages(), inputs, strict=True)]

    def alone(self, images: np.ndarray) -> list[Callable[[], object]]:
        """For each stage, what runs it alone, on what it would be given if no image left."""
        return [functools.partial(self._stage, k, values) for k, values in enumerate(self._inputs(images))]

    def stages(self) -> list[Session]:
        """Each stage compiled for the session's batch."""
        return [sessions[self.batch] for sessions in self._sessions]

    def through(self, images: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Every stage on all images: what each gives, by name, in order: logits, confidence, more."""
        check_images(images, self.batch)
        values, found = {IMAGES: images}, []
        for k, step in enumerate(self.steps):
            given = map(np.array, self._stage(k, [values[name] for name in step.inputs]))
            found.append(dict(zip(step.outputs, given, strict=True)))
            values |= found[-1]
        return found

    def _inputs(self, images: np.ndarray) -> list[list[np.ndarray]]:
        """What every stage is given if no image leaves."""
        values = {IMAGES: images}
        for given in self.through(images):
            values |= given
        return [[values[name] for name in step.inputs] for step in self.steps]

    def _stage(self, k: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """A stage on any number of images."""
        sessions, n = self._sessions[k], len(inputs[0])
        if n in sessions:
            return sessions[n].run(inputs)
        parts, start = [], 0
        while start < n:
            size = next(size for size in sessions if size <= n - start)
            parts.append(
                [np.array(each) for each in sessions[size].run([each[start : start + size] for each in inputs])]
            )
            start += size
        return [np.concatenate(each) for each in zip(*parts, strict=True)]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
