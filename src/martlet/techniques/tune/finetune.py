"""finetune: train all weights on labels, from scratch or from where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.training.objective import CrossEntropy, Objective
from martlet.training.technique import Training


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """Train all weights on labels, on the model as it stands: pruned, factorized, traced, or random.

    Where a better model is at hand, `distill` gains more from the same images, and needs no labels.

    Shape: none changes.
    Needs: images with labels (`--train`).
    Cost: about three inferences a step and image, in floating point; nothing at run time.
    Paper: Loshchilov and Hutter, 2019, arXiv 1711.05101 (AdamW); 2017, arXiv 1608.03983 (cosine); Szegedy et al., 2016,
        arXiv 1512.00567 (smoothing).
    Differs: images are changed after they were brought to the model's size, where timm's policies start from the file.
    Raises: RecipeError for a setting out of range, or images without labels; and as the loop does.
    """

    name: ClassVar[str] = "finetune"
    summary: ClassVar[str] = "train all weights on labels"
    paper: ClassVar[str] = "Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, arXiv 1711.05101"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    needs_labels: ClassVar[bool] = True

    def objective(self, model: Model, context: Context) -> Objective:
        return CrossEntropy(self.smoothing)
