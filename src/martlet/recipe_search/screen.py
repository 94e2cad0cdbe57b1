"""A cheap look at a recipe: compressed with few images, run in PyTorch on few others, its work counted.

It says what a recipe loses, and how much is left to multiply in which precision. Not what the engine makes of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.fx import GraphModule, Node

from martlet.core import pipeline
from martlet.core.errors import MartletError, NumericsError, UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Progress, silent
from martlet.data.calibration import Resized
from martlet.graph.bits import rounded_operands
from martlet.graph.stages import leaves, leaving, shapes_by_stage, stages
from martlet.graph.trace import example_values
from martlet.measure.macs import macs_by_node
from martlet.recipe_search import confidence
from martlet.recipe_search.space import Supply, expected_drops

if TYPE_CHECKING:
    from torch import Tensor

    from martlet.core.model import Model
    from martlet.engine.base import Engine


class Held:
    """Batches of preprocessed images that are held in memory, float32 (B, 3, H, W).

    labels: of the images, if they are known.
    """

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.labels = getattr(batches, "labels", None)
        self._batches = list(batches)
        self.num_images = sum(map(len, self._batches))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)


@dataclass
class Screen:
    """Everything that screening takes, so that another process can do it.

    supply: what techniques learn from. judged: other images. reference: the untouched model's logits of these,
    (images, K).
    """

    source: Model
    engine: Engine
    supply: Supply
    judged: Held
    seed: int

    def __post_init__(self) -> None:
        with torch.inference_mode():
            self.reference = np.concatenate([self.source.module(images).numpy() for images in self.judged])

    def __call__(self, yaml: str, progress: Progress = silent) -> dict[str, Any]:
        """What `losses` gives, the model's `integer_macs`, `float_macs` and `weight_bytes`, and the `seconds` it took.

        Raises:
            MartletError: the model can't take the recipe, it gives NaN, or the engine only simulates it.
        """
        from martlet.measure import size

        start = time.perf_counter()
        around = self.supply.context(self.engine, self.seed, progress)
        model = pipeline.run(self.source, Recipe.from_yaml(yaml), around)
        if self.engine.simulates(model):
            raise UsageError(f"{self.engine.name} only simulates this recipe")
        graph = pipeline.traced(model)
        each, exits = work(graph), None
        if len(each) > 1:
            logits, exits = leaving(cast(GraphModule, graph.module), Resized(self.judged, model.preprocess), progress)
        else:
            logits = self._run(model, progress)
        return {
            **losses(self.reference, logits),
            **in_mean(each, exits),
            "weight_bytes": size.weight_bytes(model.module),
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _run(self, model: Model, progress: Progress) -> np.ndarray:
        logits: list[np.ndarray] = []
        with torch.inference_mode():
            for images in Resized(self.judged, model.preprocess):
                logits.append(model.module(images).numpy())
                progress("judge on images", sum(map(len, logits)), self.judged.num_images)
        return np.concatenate(logits)


def losses(reference: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """`kl`, `agreement_pct` and `drop_pct`, expected as in `expected_drop_pct`, with the ends of 90 % intervals.

    Both (images, K), of the same images.

    Raises:
        NumericsError: NaN or infinity.
    """
    from martlet.measure.fidelity import fidelity

    if not np.isfinite(logits).all():
        raise NumericsError("this recipe gives NaN or infinity")
    drop, low, high = (100 * value for value in confidence.mean(expected_drops(reference, logits)))
    agreement, least, most = confidence.share_pct(reference.argmax(1) == logits.argmax(1))
    return {
        "kl": fidelity(reference, logits)["kl_mean"],
        "drop_pct": drop,
        "drop_low_pct": low,
        "drop_high_pct": high,
        "agreement_pct": agreement,
        "agreement_low_pct": least,
        "agreement_high_pct": most,
        "n_images": len(logits),
    }


def work(model: Model) -> list[tuple[int, int]]:
    """MACs per image of each stage, of which there is one unless the model, traced, can stop early: of two rounded
    operands, which have integer kernels, and of others."""
    graph, size = cast(GraphModule, model.module), model.preprocess.size
    if not leaves(graph):
        return [_work(graph, example_values(graph, size))]
    parts = stages(graph)
    return [_work(part.module, values) for part, values in zip(parts, shapes_by_stage(parts, size), strict=True)]


def _work(graph: GraphModule, values: Mapping[Node, torch.Size]) -> tuple[int, int]:
    found = macs_by_node(graph, values)
    integer = sum(its.macs for node, its in found.items() if rounded_operands(graph, node))
    return integer, sum(its.macs for its in found.values()) - integer


def in_mean(each: Sequence[Sequence[int]], exits: np.ndarray | None) -> dict[str, float]:
    """`integer_macs` and `float_macs` of a mean image.

    each: of the stages, as `work` gives them. exits: after which stage (images,) each left; None if there is one only.
    """
    reached = [1.0] if exits is None else [float((exits >= k).mean()) for k in range(len(each))]
    integer, floating = np.asarray(reached) @ np.asarray(each, float)
    return {"integer_macs": float(integer), "float_macs": float(floating)}


def reason(error: Exception) -> str:
    """Of what was lost, in one line; with its type, where it is no error that a user could make."""
    if isinstance(error, MartletError):
        return str(error)
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}".rstrip(": ")


def screened(screen: Screen, yaml: str, progress: Progress = silent) -> dict[str, Any]:
    """What screening says of a recipe, or why it says nothing, and the seconds. What fails costs its candidate only."""
    start = time.perf_counter()
    try:
        return screen(yaml, progress)
    except Exception as error:  # noqa: BLE001 - two techniques that don't go together; told among what was lost
        return {"why": reason(error), "seconds": round(time.perf_counter() - start, 3)}
