"""distill: the student learns the teacher's logits, and its features or attention relations if asked; no labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.distillation import divergence, hard
from martlet.training.objective import Batch, Objective, Teacher
from martlet.training.technique import Training

LOGITS = ("soft", "hard")


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """Train the model as it stands to give the logits of a teacher: the untouched model, or a better one.

    What pruning, factorizing or reducing tokens cost comes back this way, from images without labels. To start from
    random weights, or from a task of one's own, labels say more (`finetune`).

    Args:
        logits: `soft`, the teacher's probabilities; `hard`, only its first answer.
        temperature: that both models' logits are divided by, if soft.

    Shape: none changes.
    Needs: images; labels aren't used. A teacher of the same classes: the untouched model if none is given.
    Cost: about four inferences a step and image, in floating point; nothing at run time.
    Paper: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531; Touvron et al., DeiT,
        2021, arXiv 2012.12877, hard distillation.
    Differs: nothing is learned from labels, which both papers weigh in. DeiT's own token for it isn't added, for
        structure stays.
    Raises: RecipeError for a setting out of range or without images; UsageError for a teacher with other classes; and
        as the loop does.
    """

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "train the model to give a teacher's logits, from images without labels"
    paper: ClassVar[str] = "Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})

    logits: str = "soft"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logits not in LOGITS:
            raise RecipeError(f"distill: logits is {self.logits!r}; it can be {', '.join(LOGITS)}")
        if not self.temperature > 0:
            raise RecipeError(f"distill: temperature is {self.temperature}; it has to be more than 0")

    def objective(self, model: Model, context: Context) -> Objective:
        assert context.teacher is not None
        return Logits(Teacher(context.teacher, model), None if self.logits == "hard" else self.temperature)


class Logits(Objective):
    """temperature: None learns the teacher's first answer."""

    def __init__(self, teacher: Teacher, temperature: float | None) -> None:
        super().__init__()
        self.teacher, self.temperature = teacher, temperature

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        return self.judge(student(batch.images), batch)

    def judge(self, logits: Tensor, batch: Batch) -> Tensor:
        wanted = self.teacher(batch.images)
        return hard(logits, wanted) if self.temperature is None else divergence(logits, wanted, self.temperature)
