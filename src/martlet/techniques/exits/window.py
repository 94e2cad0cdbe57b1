"""window: in a cascade that may refuse to answer, only images near the border of refusal go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch.fx import GraphModule

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.functional import exits as solver
from martlet.graph.stages import ask, leaves, stages, window

LEAST = 16
"""Calibration images, for quantiles to mean something."""


@dataclass(frozen=True, kw_only=True)
class Window(Technique):
    """Let only images go on whose confidence is near the border between answering and refusing.

    Where a model answers only what it is surest of, say four fifths of the images, it matters little how sure it is of
    what is far above the border, or far below: both are decided. So images inside a window around the border go on to
    the next stage, and all others leave. The border and the window are quantiles of the confidence of calibration
    images.

    Args:
        coverage: the share of images that is to be answered.
        width: the share of images that goes on to the next stage; 1 sends all, 0 none.

    Shape: none changes.
    Needs: images, without labels. A model with exits or a cascade.
    Cost: one inference an image; nothing at run time.
    Paper: Xia and Bouganis, Window-Based Early-Exit Cascades for Uncertainty Estimation, 2023, arXiv 2303.08010.
    Differs: known from the authors' code, where the window's ends are the quantiles a tenth below and above that of the
        border, cut at 0 and 1; so near either end their window is narrower, and here the other side gets the rest. They
        look for the border by coverage, by risk or by true positives; here it is by coverage. Their cascades have two
        models; of more, each exit here has a window of its own, found on all images.
    Raises: RecipeError for a model without exits, too few images, or a setting out of range.
    """

    name: ClassVar[str] = "window"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "only images near the border of refusal go on to the next stage"
    paper: ClassVar[str] = (
        "Xia and Bouganis, Window-Based Early-Exit Cascades for Uncertainty Estimation, 2023, arXiv 2303.08010"
    )
    needs_images: ClassVar[bool] = True

    coverage: float = 0.8
    width: float = 0.2

    def __post_init__(self) -> None:
        for name in ("coverage", "width"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"window: {name} is {getattr(self, name)}; it can be from 0 to 1")

    def check(self, model: Model) -> None:
        assert isinstance(model.module, GraphModule)
        if not leaves(model.module):
            raise RecipeError(f"window: {model.name} has no exits; put cascade before it")

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        images, module = context.calibration(self), model.module
        assert isinstance(module, GraphModule)
        if images.num_images < LEAST:
            raise RecipeError(f"window: {images.num_images} calibration images are too few; give {LEAST} or more")
        confidences, _ = ask(stages(module), images, context.progress)
        bounds = []
        for exit_, confidence in zip(leaves(module), confidences.astype(np.float64), strict=True):
            bounds.append(solver.around(confidence, self.coverage, self.width))
            window(module, exit_).copy_(torch.tensor(bounds[-1]))
        return {"images": images.num_images, "windows": [[str(low), str(high)] for low, high in bounds]}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        """Windows are tensors of the model, and follow from the artifact's."""
