"""e2e_qp: of a quantized model the steps of the weights' grids alone are trained, end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.nn.quantizers import PackedWeightQuantizer
from martlet.nn.straight_through import Learned, LearnedSteps, learned
from martlet.training.objective import Objective
from martlet.training.rounded import Rounded, untouched
from martlet.training.technique import Training


@dataclass(frozen=True, kw_only=True)
class E2eQp(Training):
    """Train the steps of weights' grids, and nothing else, to give a teacher's logits: EfficientQAT's second phase.

    Comes after what chose the codes, best block by block with steps learned along (`uniform: {steps: 300, freedom:
    all}`, its first phase; both are in the recipe `efficient-qat`). A hundredth of the model learns, so it takes little
    memory and few images; `lsq`, which trains all, reaches more of many.

    Shape: none changes.
    Needs: images; labels aren't used. A teacher of the same classes: the untouched model if none is given.
    Cost: about four inferences a step and image, in floating point; nothing at run time.
    Paper: Chen et al., EfficientQAT, 2025, arXiv 2407.11062, E2E-QP and, for the freedom `all`, Block-AP; held against
        the official code.
    Differs: the loss is the teacher's logits, not labels. Steps are learned relative to what they were, whose rate is
        then the same for all. In the first phase zero points stay, which the official code learns too.
    Raises: RecipeError for a setting out of range, without images, where no weight has few bits, or where the teacher
        is rounded too; UsageError for a teacher with other classes; and as the loop does.
    """

    name: ClassVar[str] = "e2e_qp"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "train the steps of a quantized model's weights, and nothing else"
    paper: ClassVar[str] = "Chen et al., EfficientQAT, 2025, arXiv 2407.11062"

    rate: float = 1e-3
    weight_decay: float = 0.0

    def check(self, model: Model) -> None:
        if not any(isinstance(_stand_in("", module), LearnedSteps) for module in model.module.modules()):
            raise RecipeError(
                f"e2e_qp: nothing of {model.name} is rounded yet; put what quantizes before it: uniform | e2e_qp"
            )

    def objective(self, model: Model, context: Context) -> Objective:
        teacher, _ = untouched(model, context, "e2e_qp")
        return Rounded(teacher, _stand_in, steps_alone=True)


def _stand_in(_name: str, module: nn.Module) -> Learned | None:
    if isinstance(module, PackedWeightQuantizer):
        return LearnedSteps(module) if module.format is None else None
    return learned(module)
