"""hint_aug: where a model that is tuned over-fits to a patch, what it confuses its class with is put there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from martlet.core.errors import RecipeError, UsageError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Technique
from martlet.data.examples import Examples
from martlet.functional.hints import (
    attack_labels,
    confusion,
    infused,
    infusion_error,
    over_fitted_patches,
    patch_mask,
)
from martlet.training.attended import Seen, Sight
from martlet.training.objective import Batch, Objective, Teacher
from martlet.training.technique import Leading, Training
from martlet.training.tuning import Tuning


@dataclass(frozen=True, kw_only=True)
class HintAug(Leading):
    """Tune on few labels by the pass right behind it, on each image as it is and once more with a patch changed.

    That patch is the one whose attention tuning has changed most, or which is attended to most while it has changed
    little. It is moved a step towards the classes that the model confuses with the image's own: features that were
    learned before tuning, and that few images don't show. Where the pass behind mixes images, those with a patch
    changed stay unmixed. For some images a class, before `lora`, `adapter` or `vpt`. Where images needn't be mixed,
    leaving `mixup` and `cutmix` out has given as much, in shorter steps (docs/tuning.md).

    Args:
        radius: how far each pixel of a patch moves, of a range of 1.
        patches: how many of an image are changed.
        block: whose attention is looked at, from 0.
        sensitivity: from which relative change of the attention on an image is taken for over-fitted.
        begin: the share of the steps before which images are seen as they are, from 0 to 1.
        detector: patches are chosen by attention; False chooses them at random.
        infusion: patches move towards confused classes; False moves each pixel up or down at random.

    Shape: none changes.
    Needs: a plain vision transformer of two classes or more, and behind it a pass that tunes, through which gradients
        reach the images unless `infusion` is off. A teacher with the same patches: the untouched model without one.
    Cost: steps of about two and a half times as long; nothing at run time.
    Paper: Yu et al., Hint-Aug, 2023, arXiv 2304.12520, of which a summary with all equations was at hand; held against
        the official code.
    Differs: both losses are averaged in one step, where the official code takes two. It chooses two patches by the
        attention of all tokens, and moves them within the radius by chance, for the gradient doesn't reach them there;
        here both are as the paper has them.
    Raises: RecipeError for a setting out of range, nothing behind it that tunes, or that lets no gradient through, one
        class, or attention that can't be seen; SourceError for a model that isn't a transformer or has windows;
        UsageError for a teacher with other patches or classes.
    """

    name: ClassVar[str] = "hint_aug"
    summary: ClassVar[str] = "tune on few images, and once more on what the model confuses them with"
    paper: ClassVar[str] = "Yu et al., Hint-Aug, 2023, arXiv 2304.12520"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS})

    radius: float = 0.001
    patches: int = 1
    block: int = 4
    sensitivity: float = 0.1
    begin: float = 0.2
    detector: bool = True
    infusion: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.radius <= 1:
            raise RecipeError(f"hint_aug: radius is {self.radius}; it can be more than 0, up to 1")
        if self.patches < 1:
            raise RecipeError(f"hint_aug: patches is {self.patches}; it has to be more than 0")
        if self.block < 0 or not self.sensitivity >= 0:
            name = "block" if self.block < 0 else "sensitivity"
            raise RecipeError(f"hint_aug: {name} is {getattr(self, name)}; it can't be less than 0")
        if not 0 <= self.begin < 1:
            raise RecipeError(f"hint_aug: begin is {self.begin}; it can be 0, or more and less than 1")

    def check_next(self, following: Technique | None) -> None:
        if not isinstance(following, Tuning):
            found = "nothing" if following is None else following.name
            raise RecipeError(
                f"hint_aug: it changes what the pass right behind it tunes on, which is {found}; put one there that "
                "tunes: hint_aug | lora"
            )

    def check(self, model: Model) -> None:
        if model.num_classes < 2:
            raise RecipeError(f"hint_aug: {model.name} has {model.num_classes} class, and none to confuse it with")
        grid = Sight.of(model, self.block, self.name).grid
        if self.patches > grid[0] * grid[1]:
            raise RecipeError(f"hint_aug: {model.name} has {grid[0] * grid[1]} patches; patches can be no more")

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        """Notes where attention is to be seen, which is hard to tell once layers have been put in."""
        return Sight.of(model, self.block, self.name).to_json()

    def around(
        self, objective: Objective, record: Mapping[str, Any], model: Model, settings: Training, context: Context
    ) -> Objective:
        return Hinted(objective, self, Sight.from_json(record), model, settings, context)


class Hinted(Objective):
    """Another objective on a batch as it is, and on the same with patches changed.

    confusion: (K, K), of an epoch, as of `functional.hints.confusion`. gathering: the same, of the next.
    """

    confusion: Tensor
    gathering: Tensor

    def __init__(
        self, inner: Objective, hints: HintAug, sight: Sight, model: Model, settings: Training, context: Context
    ) -> None:
        super().__init__()
        assert context.teacher is not None
        self.inner, self.hints, self.sight = inner, hints, sight
        self.teacher, self.preprocess = Teacher(context.teacher, model), model.preprocess
        self.settings = settings
        self.theirs = Sight.of(context.teacher, hints.block, hints.name) if hints.detector else sight
        if self.theirs.grid != sight.grid:
            down, across = self.theirs.grid
            raise UsageError(
                f"hint_aug: the teacher {context.teacher.name} has {down} × {across} patches and {model.name} has "
                f"{sight.grid[0]} × {sight.grid[1]}; give the model before it was tuned, for images of this size"
            )
        for name in ("confusion", "gathering"):
            self.register_buffer(name, torch.zeros(model.num_classes, model.num_classes))

    def learned_from(self, examples: Examples) -> Examples:
        found = self.inner.learned_from(examples)
        self._epoch = len(found) // min(self.settings.batch, len(found))
        return found

    def begin_step_(self, student: nn.Module, step: int) -> None:
        self.inner.begin_step_(student, step)
        if step % self._epoch == 0:
            self.confusion.copy_(self.gathering)
            self.gathering.zero_()

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch.unmixed or (batch.images, batch.labels)
        assert labels is not None
        begun = batch.step >= self.hints.begin * batch.steps
        images = images.detach().requires_grad_(begun and self.hints.infusion)
        with self.sight.watch(student) as seen:
            error = self.inner.loss(student, batch if batch.unmixed else replace(batch, images=images))
        self.gathering += confusion(seen.logits.detach(), labels)
        if not begun:
            return error
        if batch.unmixed:
            with self.sight.watch(student) as seen:
                student(images)
        changed = self._changed(images, labels, seen)
        return (error + self.inner.loss(student, replace(batch, images=changed, labels=labels))) / 2

    def _changed(self, images: Tensor, labels: Tensor, seen: Seen) -> Tensor:
        """Images (B, 3, H, W) with some patches a step further."""
        slope = self._slope(images, labels, seen.logits) if self.hints.infusion else 0.5 - torch.rand_like(images)
        mean, std = (value.to(images) for value in self.preprocess.statistics())
        mask = patch_mask(self._patches(images, seen), self.sight.grid, self.preprocess.size)
        step = -self.hints.radius / std * slope.sign()
        return infused(images.detach(), step, mask, -mean / std, (1 - mean) / std)

    def _slope(self, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        """Of the error from confused classes, by pixel (B, 3, H, W): against it, images come nearer to these."""
        error = infusion_error(logits, attack_labels(self.confusion, labels))
        [slope] = torch.autograd.grad(error, images, retain_graph=True, allow_unused=True)
        if slope is None:
            raise RecipeError(
                f"hint_aug: {self.settings.name} lets no gradient through to the images; tune with lora, adapter or "
                "vpt, or set infusion: false"
            )
        return slope

    def _patches(self, images: Tensor, seen: Seen) -> Tensor:
        """Which patches of each image to change, (B, patches)."""
        if not self.hints.detector:
            every = torch.rand(len(images), self.sight.grid[0] * self.sight.grid[1], device=images.device)
            return every.topk(self.hints.patches, 1).indices
        with self.theirs.watch(self.teacher.model.module) as theirs:
            self.teacher(images)
        return over_fitted_patches(theirs.scores(), seen.scores(), self.hints.sensitivity, self.hints.patches)

    def prepare_(self, student: nn.Module) -> None:
        self.inner.prepare_(student)

    def finish_(self, student: nn.Module) -> None:
        self.inner.finish_(student)

    def groups(self, student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        return self.inner.groups(student, weight_decay)

    def climb_(self, learned: list[Tensor]) -> bool:
        return self.inner.climb_(learned)

    def descend_(self, learned: list[Tensor]) -> None:
        self.inner.descend_(learned)

    def judge(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.inner.judge(logits, batch)
