"""A cheap look at a recipe: compressed with few images, run in PyTorch on few others, its work counted.

It says what a recipe loses, and how much is left to multiply in which precision. Not what the engine makes of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from martlet.core import pipeline
from martlet.core.errors import MartletError, NumericsError, UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Progress, silent
from martlet.data.calibration import Resized
from martlet.recipe_search import confidence
from martlet.recipe_search.space import context, expected_drops

if TYPE_CHECKING:
    from torch import Tensor

    from martlet.core.model import Model
    from martlet.engine.base import Engine


class Held:
    """Batches of preprocessed images that are held in memory, float32 (B, 3, H, W)."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._batches = list(batches)
        self.num_images = sum(map(len, self._batches))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)


@dataclass
class Screen:
    """Everything that screening takes, so that another process can do it.

    calibration: images that techniques learn from. judged: others. reference: the untouched model's logits of these,
    (images, K).
    """

    source: Model
    engine: Engine
    calibration: Held
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
        around = context(self.engine, self.calibration, self.seed, progress)
        model = pipeline.run(self.source, Recipe.from_yaml(yaml), around)
        if self.engine.simulates(model):
            raise UsageError(f"{self.engine.name} only simulates this recipe")
        integer, floating = work(model)
        logits = []
        with torch.inference_mode():
            for images in Resized(self.judged, model.preprocess):
                logits.append(model.module(images).numpy())
                progress("judge on images", sum(map(len, logits)), self.judged.num_images)
        return {
            **losses(self.reference, np.concatenate(logits)),
            "integer_macs": integer,
            "float_macs": floating,
            "weight_bytes": size.weight_bytes(model.module),
            "seconds": round(time.perf_counter() - start, 3),
        }


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


def work(model: Model) -> tuple[int, int]:
    """MACs per image, of two rounded operands, which have integer kernels, and of others."""
    from torch.fx import GraphModule

    from martlet.graph.bits import rounded_operands
    from martlet.graph.trace import example_values, trace
    from martlet.measure.macs import macs_by_node

    size = model.preprocess.size
    graph = model.module if isinstance(model.module, GraphModule) else trace(model.module, size)
    found = macs_by_node(graph, example_values(graph, size))
    integer = sum(its.macs for node, its in found.items() if rounded_operands(graph, node))
    return integer, sum(its.macs for its in found.values()) - integer


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
