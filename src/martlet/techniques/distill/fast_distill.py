"""fast_distill: a teacher's answers are asked once and kept, and students learn them without the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.kept import Kept, digest
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.distillation import spread
from martlet.training.answers import HELD_BACK, Answers
from martlet.training.objective import Batch, Objective, Teacher
from martlet.training.technique import Training


@dataclass(frozen=True, kw_only=True)
class FastDistill(Training):
    """Train the model on a teacher's few largest probabilities, which are asked once for each change of each image.

    An image's change follows from a seed, so a student replays what the teacher saw without running it. The way to
    train long, or several students, by a large teacher. For one short training `distill` says more of each image.

    Args:
        top: classes that are kept of each answer.
        stored: the folder that answers are kept in, for other students to find; empty keeps them for this training
            alone. Another student needs the same images, seed, changes and `top`, and no teacher.

    Shape: none changes.
    Needs: images; labels aren't used. A teacher of the same classes: the untouched model if none is given. On disk 6
        bytes a kept class, image and epoch.
    Cost: an inference of the teacher for each image and epoch, once; then about three inferences of the student a step
        and image; nothing at run time.
    Paper: Wu et al., TinyViT: Fast Pretraining Distillation, 2022, arXiv 2207.10666; held against the official code.
    Differs: images aren't mixed. Seeds follow from the training's, and are kept to be compared.
    Raises: RecipeError for a setting out of range or without images; UsageError for a teacher with other classes, or a
        folder with answers to something else; and as the loop does.
    """

    name: ClassVar[str] = "fast_distill"
    summary: ClassVar[str] = "train on a teacher's largest probabilities, asked once and replayed"
    paper: ClassVar[str] = "Wu et al., TinyViT: Fast Pretraining Distillation, 2022, arXiv 2207.10666"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})

    top: int = 10
    stored: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise RecipeError(f"fast_distill: top is {self.top}; it has to be more than 0")
        if self.mixup or self.cutmix:
            raise RecipeError("fast_distill: answers are to single images; leave mixup and cutmix out")

    def objective(self, model: Model, context: Context) -> Objective:
        from martlet.training.loop import parts
        from martlet.training.order import Order, processes

        teacher, examples = context.teacher, self.examples(model, context)
        assert teacher is not None
        judged, learned = parts(examples, context.seed)
        order = Order(n=len(learned), batch=min(self.batch, len(learned)), seed=context.seed)
        top = min(self.top, model.num_classes)
        about = {
            "images": examples.digest,
            "seed": str(context.seed),
            "change": f"{self.augment} {self.erase}",
            "top": str(top),
            "number of classes": str(model.num_classes),
        }
        folder = Kept(Path(self.stored)) if self.stored else None
        if folder is None and context.kept is not None:
            folder = Kept(context.kept.folder / f"answers-{digest([teacher.name, *about.values()])}")
        # without --teacher, whose answers these are doesn't matter; they may be another's
        named = "" if teacher.name == model.name and self.stored else teacher.name
        answers = Answers(top=top, kept=folder, about=about, teacher=named, memory={})

        def ask() -> None:
            with processes().main_process_first():
                asked = partial(Teacher, teacher, model)
                change = self.augment, self.erase
                answers.ask(asked, learned, judged, order, math.ceil(self.epochs), change, context.progress)

        return Replay(answers, ask, order.per_epoch, model.num_classes)


class Replay(Objective):
    """ask: fills in the answers that aren't there yet. per_epoch: steps."""

    def __init__(self, answers: Answers, ask: Callable[[], None], per_epoch: int, num_classes: int) -> None:
        super().__init__()
        self.answers, self.ask, self.per_epoch, self.num_classes = answers, ask, per_epoch, num_classes

    def prepare_(self, student: nn.Module) -> None:
        self.ask()

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        return self._error(student(batch.images), batch, batch.step // self.per_epoch)

    def judge(self, logits: Tensor, batch: Batch) -> Tensor:
        return self._error(logits, batch, HELD_BACK)

    def _error(self, logits: Tensor, batch: Batch, epoch: int) -> Tensor:
        values, classes = self.answers.of(batch, epoch)
        return functional.cross_entropy(logits.float(), spread(values, classes, self.num_classes))
