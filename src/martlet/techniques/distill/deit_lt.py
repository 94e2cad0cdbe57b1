"""deit_lt: of a model with two tokens one learns labels, and one a teacher's, where rare classes weigh more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.functional.distillation import effective_weights
from martlet.training.objective import Batch, CrossEntropy, Objective, Teacher
from martlet.training.technique import Training


@dataclass(frozen=True, kw_only=True)
class DeitLt(Training):
    """Train a distilled vision transformer from scratch on classes of which some have few images.

    The class token learns the labels; the distillation token a teacher's first answers to the same images, strongly
    changed, as hard labels, and late in training each class by the inverse of its effective number of images. So one
    becomes good at common classes and one at rare ones. The teacher is best a convolutional network, trained with `sam`
    on the same images, of each class as often: one that never answers with a rare class teaches nothing of it.

    Args:
        beta: how effective one more image of a class is, from 0, not at all, to 1, each as the first.
        late: the share of the steps after which classes are weighed.

    Shape: none changes.
    Needs: images with labels (`--train`), a teacher of the same classes (`--teacher`), and a model with a distillation
        token.
    Cost: about four inferences a step and image; nothing at run time.
    Paper: Rangwani et al., DeiT-LT, 2024, arXiv 2404.02900; held against the official code.
    Differs: images go on being mixed, where that is asked for, once classes are weighed.
    Raises: RecipeError for a setting out of range, images without labels, or a model without distillation token;
        UsageError for a teacher with other classes; and as the loop does.
    """

    name: ClassVar[str] = "deit_lt"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "train a distilled ViT on classes of which some have few images"
    paper: ClassVar[str] = "Rangwani et al., DeiT-LT, 2024, arXiv 2404.02900"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    needs_labels: ClassVar[bool] = True

    beta: float = 0.9999
    late: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "late"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"deit_lt: {name} is {getattr(self, name)}; it can be 0, or more and less than 1")

    def check(self, model: Model) -> None:
        if not isinstance(model.module, VisionTransformerDistilled):
            raise RecipeError(
                f"deit_lt: {model.name} has no distillation token; take one as timm:deit_tiny_distilled_patch16_224"
            )

    def objective(self, model: Model, context: Context) -> Objective:
        teacher, examples = context.teacher, context.training
        assert teacher is not None and examples is not None and examples.labels is not None
        counts = torch.bincount(examples.labels, minlength=model.num_classes).float()
        return TwoTokens(self.smoothing, Teacher(teacher, model), effective_weights(counts, self.beta), self.late)


class TwoTokens(CrossEntropy):
    """weights: by class, (K,), once a share `late` of the steps is done."""

    weights: Tensor

    def __init__(self, smoothing: float, teacher: Teacher, weights: Tensor, late: float) -> None:
        super().__init__(smoothing)
        self.teacher, self.late = teacher, late
        self.register_buffer("weights", weights)

    def prepare_(self, student: nn.Module) -> None:
        assert isinstance(student, VisionTransformerDistilled)
        student.set_distilled_training(True)

    def finish_(self, student: nn.Module) -> None:
        assert isinstance(student, VisionTransformerDistilled)
        student.set_distilled_training(False)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        labels, taught = student(batch.images)  # (B, K) of each token
        weights = self.weights if batch.step >= self.late * batch.steps else None
        wanted = self.teacher(batch.images).argmax(1)
        return (self.error(labels, batch) + functional.cross_entropy(taught.float(), wanted, weights)) / 2
