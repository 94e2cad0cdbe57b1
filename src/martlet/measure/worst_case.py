"""What images cost that were made to cost as much as they can, in a model that can stop early."""

from __future__ import annotations

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
from martlet.nn.exits import goes_on

EPSILON = 8 / 255
"""How far a pixel, from 0 to 1, may be moved."""
STEPS = 10


def worst_case(
    model: Model, images: Tensor, epsilon: float = EPSILON, steps: int = STEPS, progress: Progress = silent
) -> dict[str, Any]:
    """Moves pixels so that exits are less sure, and says what images cost before and after.

    images: (B, 3, H, W), preprocessed. epsilon: the most that a pixel in [0, 1] is moved by. steps: of projected
    gradient descent on the confidences of all exits, each a quarter of epsilon long.

    Returns `n_images`, `epsilon`, `mean_gmacs` and `attacked_mean_gmacs`, `inflation` (their ratio),
    `attacked_max_gmacs`, and `max_gmacs`, the cap that the policy declares: stages behind it aren't there to be run.

    Source: Gao et al., Verbose Images, 2024, arXiv 2401.11170, whose aim, longer outputs, is here later exits; Madry et
    al., 2018, arXiv 1706.06083, for the descent.

    Raises:
        UsageError: the model can't stop early.
    """
    module = pipeline.traced(model).module
    assert isinstance(module, GraphModule)
    exits, parts = leaves(module), stages(module)
    if not exits:
        raise UsageError(f"{model.name} can't stop early, so every image costs the same")
    windows = [window(module, each) for each in exits]
    gmacs = np.array(cumulative_macs(parts, model.preprocess.size)) / 1e9
    before = gmacs[_leave_at(parts, windows, images)]
    scale, low, high = _pixels(model.preprocess)
    attacked = images.clone()
    for step in range(steps):
        attacked.requires_grad_(True)
        confidences = [[*given.values()][1] for given in run(parts, attacked)[:-1]]
        [gradient] = torch.autograd.grad(torch.stack(confidences).log().sum(), attacked)
        with torch.no_grad():
            moved = attacked - gradient.sign() * epsilon / 4 / scale
            moved = torch.minimum(torch.maximum(moved, images - epsilon / scale), images + epsilon / scale)
            attacked = torch.minimum(torch.maximum(moved, low), high)
        progress("make images cost more", step + 1, steps)
    after = gmacs[_leave_at(parts, windows, attacked)]
    closed = [k for k, each in enumerate(windows) if each[0] == torch.inf]
    return {
        "n_images": len(images),
        "epsilon": epsilon,
        "mean_gmacs": float(before.mean()),
        "attacked_mean_gmacs": float(after.mean()),
        "inflation": float(after.mean() / before.mean()),
        "attacked_max_gmacs": float(after.max()),
        "max_gmacs": float(gmacs[closed[0]] if closed else gmacs[-1]),
    }


@torch.no_grad()
def _leave_at(parts: list[Stage], windows: list[Tensor], images: Tensor) -> np.ndarray:
    """The stage (B,) after which each image leaves."""
    found = [[*given.values()][1] for given in run(parts, images)[:-1]]
    leaving = torch.stack([~goes_on(confidence, each) for confidence, each in zip(found, windows, strict=True)])
    return torch.where(leaving.any(0), leaving.int().argmax(0), len(windows)).numpy()


def _pixels(preprocess: Preprocess) -> tuple[Tensor, Tensor, Tensor]:
    """The standard deviation, and what pixels of 0 and 1 are once normalized: (3, 1, 1) each."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    return std, -mean / std, (1 - mean) / std
