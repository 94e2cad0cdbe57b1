"""taylor: the units that the loss's first derivative says matter least are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.vit.gradients import contributions
from martlet.vit.pruning import Kind, ScoredPruning, Scores
from martlet.vit.view import VitView


@dataclass(frozen=True, kw_only=True)
class Taylor(ScoredPruning):
    """Cut the units that a first-order expansion of the loss says matter least, and leave a smaller dense model.

    Setting a weight w to 0 changes the loss by about -g w, g being its gradient. A unit's score is the sum of |g w|
    over its weights, averaged over batches; those of the least score for each MAC saved go first. A baseline: what is
    lost with a unit that others can replace, a derivative doesn't see, and `ziplm` does.

    Args:
        prune_ratio: share of the model's MACs to remove, attention's products counted; 0 removes nothing.

    Shape: unchanged outside; heads, their dimensions and hidden units inside.
    Needs: calibration images, without labels, and memory for gradients of one batch.
    Cost: at compress time, one forward and backward pass of the images, and six forward passes for the repair; at run
        time, less than before.
    Paper: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, arXiv 1906.10771: the
        first-order form.
    Differs: written without the paper's text at hand. Absolute values in place of squares, as Torch-Pruning has them,
        so that sizes of groups compare. Without labels, the loss is the cross entropy with the model's own classes. One
        step, not many with training between; what stays is refitted in closed form.
    Raises: RecipeError for a ratio that would empty layers, or a group that the model can't cut; SourceError for a
        model that isn't a vision transformer.
    """

    name: ClassVar[str] = "taylor"
    summary: ClassVar[str] = "cut the units that gradients say matter least"
    paper: ClassVar[str] = "Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, arXiv 1906.10771"

    def scores(self, model: Model, vit: VitView, context: Context) -> Scores:
        images, totals = context.calibration(self), dict[tuple[int, Kind], Tensor]()
        for found in contributions(model.module, images, self.cuttable(vit), absolute=True, progress=context.progress):
            for key, value in found.items():
                totals[key] = totals.get(key, 0) + value
        return totals
