"""What images cost that were made to cost as much as they can, in a model that can stop early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from martlet.core import pipeline
from martlet.core.errors import UsageError
from martlet.core.model import Model
from martlet.core.technique import Progress, silent
from martlet.data.preprocess import Preprocess
from martlet.graph.stages import Stage, cumulative_macs, leaves, run, stages, window
from martlet.nn.exits import goes_on, has_exits
from martlet.nn.quantizers import ActivationQuantizer, TableQuantizer
from martlet.nn.straight_through import learned

EPSILON = 8 / 255
"""How far a pixel, from 0 to 1, may be moved."""
STEPS = 10


def worst_case(
    model: Model, images: Tensor, epsilon: float = EPSILON, steps: int = STEPS, progress: Progress = silent
) -> dict[str, Any]:
    """Moves pixels so that images don't leave where they would, and says what images cost before and after.

    images: (B, 3, H, W), preprocessed. epsilon: the most that a pixel in [0, 1] is moved by. steps: of projected
    gradient descent, each a quarter of epsilon long, on how far the confidence at the exit where an image leaves is
    from those with which it would go on. Only signs of gradients count, so it is one whether an exit tells how sure it
    is by a probability, a cosine or a gate's score. Gradients pass what is rounded as if it weren't. An image counts
    with the most that it has cost at any step.

    Returns `n_images`, `epsilon`, `mean_gmacs` and `attacked_mean_gmacs`, `inflation` (their ratio),
    `attacked_max_gmacs`, and `max_gmacs`, the cap that the policy declares: stages behind it aren't there to be run.

    Source: Gao et al., Verbose Images, 2024, arXiv 2401.11170, whose aim, longer outputs, is here later exits, and in
    whose code too the longest that was seen counts; Madry et al., 2018, arXiv 1706.06083, for the descent.

    Raises:
        UsageError: the model can't stop early.
    """
    if not has_exits(model.module):
        raise UsageError(f"{model.name} can't stop early, so every image costs the same")
    module = pipeline.traced(model).module
    assert isinstance(module, GraphModule)
    windows = [window(module, each) for each in leaves(module)]
    cap = next((k for k, (low, high) in enumerate(windows) if low >= high), len(windows))
    parts, windows = stages(module)[: cap + 1], windows[: cap + 1]
    gmacs = np.array(cumulative_macs(parts, model.preprocess.size)) / 1e9
    for part in parts:
        _let_gradients_pass_(part.module)
    scale, low, high = _pixels(model.preprocess)
    attacked, seen = images.clone(), []
    for step in range(steps):
        at, short = _leave(parts, windows, attacked.requires_grad_(True))
        [gradient] = torch.autograd.grad(short[at < cap].sum(), attacked)
        with torch.no_grad():
            moved = attacked - gradient.sign() * epsilon / 4 / scale
            moved = torch.minimum(torch.maximum(moved, images - epsilon / scale), images + epsilon / scale)
            attacked = torch.minimum(torch.maximum(moved, low), high)
        seen.append(at)
        progress("make images cost more", step + 1, steps)
    with torch.no_grad():
        seen.append(_leave(parts, windows, attacked)[0])
    before, after = gmacs[seen[0].numpy()], gmacs[torch.stack(seen).amax(0).numpy()]
    return {
        "n_images": len(images),
        "epsilon": epsilon,
        "mean_gmacs": float(before.mean()),
        "attacked_mean_gmacs": float(after.mean()),
        "inflation": float(after.mean() / before.mean()),
        "attacked_max_gmacs": float(after.max()),
        "max_gmacs": float(gmacs[-1]),
    }


def _leave(parts: Sequence[Stage], windows: Sequence[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """The stage (B,) after which each image leaves, and how far (B,) its confidence there is from its going on.

    What goes on past all exits leaves after the stage behind them, and how far that is means nothing.
    """
    found = zip(run(parts, images), windows, strict=False)  # the last stage has no confidence
    confidence, bounds = torch.stack([[*given.values()][1] for given, _ in found]), torch.stack([*windows], 1)
    bounds = bounds[..., None]  # (2, E, 1)
    leaving = ~goes_on(confidence, bounds)  # (E, B)
    at = torch.where(leaving.any(0), leaving.int().argmax(0), len(windows))
    short = torch.maximum(bounds[0] - confidence, confidence - bounds[1])
    return at, short.gather(0, at.clamp(max=len(windows) - 1)[None])[0]


def _let_gradients_pass_(graph_module: GraphModule) -> None:
    for name, module in [*graph_module.named_modules()]:
        if isinstance(module, ActivationQuantizer | TableQuantizer):
            graph_module.set_submodule(name, learned(module))  # type: ignore[arg-type]


def _pixels(preprocess: Preprocess) -> tuple[Tensor, Tensor, Tensor]:
    """The standard deviation, and what pixels of 0 and 1 are once normalized: (3, 1, 1) each."""
    mean, std = preprocess.statistics()
    return std, -mean / std, (1 - mean) / std
