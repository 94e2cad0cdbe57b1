"""What a technique puts into the loop: what is learned, from which loss, and what is changed before and after."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.errors import UsageError
from martlet.core.model import Model
from martlet.data.examples import Examples
from martlet.functional.distillation import divergence
from martlet.training.signals import Signals, observe

RATE = "rate_scale"
"""Of a group of parameters: its learning rate over the technique's."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one step.

    images: float32 (B, 3, H, W), normalized. labels: (B,), or probabilities (B, K) once mixed; None without labels.
    indices, seeds: int64 (B,), which images they are, and how each was changed. step: from 0. steps: how many in all.
    unmixed: images and labels as they were before they were mixed, if they were.
    """

    images: Tensor
    labels: Tensor | None
    indices: np.ndarray
    seeds: np.ndarray
    step: int
    steps: int
    unmixed: tuple[Tensor, Tensor | None] | None = None

    def first(self, size: int) -> Batch:
        """So many images of it."""

        def cut(its: Tensor | None) -> Tensor | None:
            return None if its is None else its[:size]

        return replace(
            self,
            images=self.images[:size],
            labels=cut(self.labels),
            indices=self.indices[:size],
            seeds=self.seeds[:size],
            unmixed=self.unmixed and (self.unmixed[0][:size], cut(self.unmixed[1])),
        )


class Objective(nn.Module):
    """A loss, and what it needs. A module, so that what it learns besides the student trains and is kept with it."""

    def learned_from(self, examples: Examples) -> Examples:
        """What takes the place of the images; those that are judged by are apart already."""
        return examples

    def begin_step_(self, student: nn.Module, step: int) -> None:
        """Before the images of a step, from 0, are read."""

    def prepare_(self, student: nn.Module) -> None:
        """Before anything is learned: hooks, layers that learn in place of others."""

    def finish_(self, student: nn.Module) -> None:
        """Undoes `prepare_`, with what was learned in its place."""

    def groups(self, student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """What is learned, as groups of an optimizer; all else stays as it is. `rate_scale` scales a group's rate.

        Without more: all parameters, of which those of one dimension and those that the model names don't decay.
        """
        from timm.optim import param_groups_weight_decay

        spared = student.no_weight_decay() if hasattr(student, "no_weight_decay") else ()  # type: ignore[operator]
        both = nn.ModuleList([student, self])
        return param_groups_weight_decay(both, weight_decay, no_weight_decay_list={f"0.{name}" for name in spared})

    @abstractmethod
    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        """What is made small, averaged over the batch: one number."""

    def climb_(self, learned: list[Tensor]) -> bool:
        """With the gradient known, moves the weights to where it is to be taken anew for the step; False if nowhere."""
        return False

    def descend_(self, learned: list[Tensor]) -> None:
        """Undoes `climb_`."""

    def judge(self, logits: Tensor, batch: Batch) -> Tensor:
        """How far logits (B, K) of images that weren't learned from are from what is wanted, averaged."""
        assert batch.labels is not None
        return functional.cross_entropy(logits, batch.labels)


class CrossEntropy(Objective):
    """With labels, or with probabilities where images were mixed, which are smoothed already."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        return self.error(student(batch.images), batch)

    def error(self, logits: Tensor, batch: Batch) -> Tensor:
        """Of logits (B, K) from the batch's labels."""
        assert batch.labels is not None
        smoothing = self.smoothing if batch.labels.ndim == 1 else 0.0
        return functional.cross_entropy(logits.float(), batch.labels, label_smoothing=smoothing)


class Teacher:
    """A model that is asked and never changed. No part of the objective's module, so neither kept nor trained.

    Raises:
        UsageError: it has other classes than the student.
    """

    def __init__(self, model: Model, student: Model) -> None:
        if model.num_classes != student.num_classes:
            raise UsageError(
                f"the teacher {model.name} has {model.num_classes} classes and {student.name} has "
                f"{student.num_classes}; choose a teacher with the same classes"
            )
        self.model = model
        self._own, self._students = model.preprocess, student.preprocess

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images that are preprocessed for the student."""
        return self.model.module(self.view(images))

    @torch.no_grad()
    def observe(self, images: Tensor, attention: bool = False) -> tuple[Tensor, Signals]:
        """Logits, and what leads to them, as `training.signals.observe` gives it."""
        return observe(self.model.module, self.view(images), attention)

    def view(self, images: Tensor) -> Tensor:
        """The student's images (B, 3, H, W) as the teacher takes them, enlarged or made smaller where it has to be."""
        own, students = self._own, self._students
        if (own.mean, own.std) != (students.mean, students.std):
            scale, shift = (value.to(images) for value in students.renormalized(own))
            images = images * scale + shift
        if own.size == students.size:
            return images
        return functional.interpolate(images, own.size, mode="bicubic", antialias=True)


class Taught(Objective):
    """A teacher's logits; no labels."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        return self.judge(student(batch.images), batch)

    def judge(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.error(logits, self.teacher(batch.images))

    def error(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Of logits (B, K) from the teacher's."""
        return divergence(logits, wanted)
