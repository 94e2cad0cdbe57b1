"""teacher_intervention: of a quantized model's attentions a teacher's signals take the place, less and less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.graph.attention import signals
from martlet.training.intervened import Intervened
from martlet.training.objective import Objective
from martlet.training.rounded import check_rounded, learning, untouched
from martlet.training.technique import Training


@dataclass(frozen=True, kw_only=True)
class TeacherIntervention(Training):
    """Train a quantized model as `lsq` does, on a teacher's signals in the place of its own at first.

    What rounding does to early blocks would otherwise mislead the later ones. In the first part of the training the
    teacher gives what each attention adds; then what its heads give; then its weights alone; and then nothing. All the
    while scores and outputs of attentions are learned besides the logits. For weights of 2 bits or less and short
    training; with 3 bits and more `lsq` takes shorter steps.

    Args:
        intervened: the share of the steps in which the teacher intervenes, from 0 to 1: a sixth of them with outputs, a
            sixth with what heads give, and the rest with weights. 0 learns the same without it.

    Shape: none changes.
    Needs: images; labels aren't used. A teacher of the same shape: the untouched model if none is given.
    Cost: about five inferences a step and image, in floating point; nothing at run time.
    Paper: Kim et al., Teacher Intervention, 2023, arXiv 2302.11812, whose text wasn't at hand; held against the
        official code, gradual intervention.
    Differs: grids and steps are learned as of `lsq`, where the official code takes ternary weights. Errors of scores
        and outputs are relative to the teacher's and averaged over attentions, and what blocks give isn't learned. They
        pass their gradients on to earlier blocks, at which the official code stops them. One schedule of the rate goes
        through both parts, where the official code begins a second.
    Raises: RecipeError for a setting out of range, without images, where nothing is rounded, without attention, or
        where the teacher is rounded too; UsageError for a teacher with other classes or of another shape; and as the
        loop does.
    """

    name: ClassVar[str] = "teacher_intervention"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "train a quantized model on a teacher's attentions in the place of its own at first"
    paper: ClassVar[str] = "Kim et al., Teacher Intervention, 2023, arXiv 2302.11812"

    intervened: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.intervened <= 1:
            raise RecipeError(f"teacher_intervention: intervened is {self.intervened}; it can be from 0 to 1")

    def check(self, model: Model) -> None:
        check_rounded(model, self.name)
        if not signals(model.module):  # type: ignore[arg-type]
            raise RecipeError(f"teacher_intervention: {model.name} has no attention; `lsq` trains any")

    def objective(self, model: Model, context: Context) -> Objective:
        teacher, graph = untouched(model, context, self.name)
        return Intervened(teacher, graph, learning(model, graph), self.intervened)
