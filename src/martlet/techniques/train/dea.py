"""dea: a few images are chosen whose gradients stand for all, and only these are augmented."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.data.subset import Subset
from martlet.functional.facility_location import even_shares, facility_location, likeness, stands_for
from martlet.training.objective import Batch, CrossEntropy, Objective
from martlet.training.technique import Training

CHOICES = ("gradients", "random")
BATCH = 256
"""Images that are looked at together when some are chosen."""


@dataclass(frozen=True, kw_only=True)
class Dea(Training):
    """Train all weights on labels, on few chosen images, each as it is and once more strongly augmented.

    Now and then, images are chosen whose gradients by the logits are as near as can be to all others' of their class,
    and count for as many as are near to them. An epoch is then a fraction of one over all images and their augmented
    twins. With time for all images, `finetune` with strong augmentation reaches more.

    Args:
        chosen: the share of the images, above 0 and to 1.
        every: epochs until they are chosen anew; an epoch is one of what is seen.
        choice: `gradients`, or `random`, which has to be beaten.
        whole: all images are seen without augmentation, and the chosen ones alone with; else only these are seen.
        plain: how images are changed that aren't augmented: `none` or `crop`, as of `augment`.

    Shape: none changes.
    Needs: images with labels (`--train`); memory for the square of the images of one class.
    Cost: a step as of `finetune`; of all images and their augmented twins, an epoch has the share that is chosen; an
        inference of all images each time some are; nothing at run time.
    Paper: Liu and Mirzasoleiman, Data-Efficient Augmentation for Training Neural Networks, 2022, arXiv 2210.08363;
        Mirzasoleiman et al., CRAIG, 2020, arXiv 1906.01827, for how they are chosen; of both the text wasn't at hand;
        held against the official code.
    Differs: likeness is the greatest distance less the distance, so that the sum of distances to the nearest chosen
        one is made small; the official code leaves it to a library.
    Raises: RecipeError for a setting out of range, images without labels, or mixup; and as the loop does.
    """

    name: ClassVar[str] = "dea"
    summary: ClassVar[str] = "train on few images that stand for all, and augment only these"
    paper: ClassVar[str] = "Liu and Mirzasoleiman, Data-Efficient Augmentation, 2022, arXiv 2210.08363"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    needs_labels: ClassVar[bool] = True

    augment: str = "rand-m9-mstd0.5-inc1"
    chosen: float = 0.3
    every: int = 5
    choice: str = "gradients"
    whole: bool = False
    plain: str = "crop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.chosen <= 1:
            raise RecipeError(f"dea: chosen is {self.chosen}; it can be more than 0, up to 1")
        if self.every < 1:
            raise RecipeError(f"dea: every is {self.every}; it has to be more than 0")
        if self.choice not in CHOICES:
            raise RecipeError(f"dea: choice is {self.choice!r}; it can be {', '.join(CHOICES)}")
        if self.plain not in ("none", "crop"):
            raise RecipeError(f"dea: plain is {self.plain!r}; it can be none or crop")
        if self.mixup or self.cutmix:
            raise RecipeError("dea: images are chosen one by one; leave mixup and cutmix out")

    def objective(self, model: Model, context: Context) -> Objective:
        return Chosen(self, context.seed)


class Chosen(CrossEntropy):
    """rows: the images that are chosen, (k,). weights: (k,), for how many each counts, 1 on average."""

    rows: Tensor
    weights: Tensor

    def __init__(self, settings: Dea, seed: int) -> None:
        super().__init__(settings.smoothing)
        self.settings, self.seed = settings, seed

    def learned_from(self, examples: Examples) -> Examples:
        k = max(1, round(self.settings.chosen * len(examples)))
        self._all, self._seen = examples, Subset(examples, k, self.settings.plain, self.settings.whole)
        self._period = self.settings.every * max(1, len(self._seen) // self.settings.batch)
        self.register_buffer("rows", torch.arange(k))
        self.register_buffer("weights", torch.ones(k))
        return self._seen

    def begin_step_(self, student: nn.Module, step: int) -> None:
        if step % self._period == 0:
            rows, counts = self._choose(student, step)
            self.rows.copy_(rows)
            self.weights.copy_(counts / counts.float().mean())
        self._seen.choose_(self.rows.cpu())

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        assert batch.labels is not None
        errors = functional.cross_entropy(
            student(batch.images).float(), batch.labels, label_smoothing=self.smoothing, reduction="none"
        )
        return (errors * self._weights_of(batch)).mean()

    def _weights_of(self, batch: Batch) -> Tensor:
        """(B,): of images as they are those of the choice, unless all are seen; of augmented ones 1."""
        ones = torch.ones_like(self.weights)
        first = self.weights.new_ones(len(self._all)) if self.settings.whole else self.weights
        return torch.cat([first, ones])[torch.from_numpy(batch.indices).to(ones.device)]

    def _choose(self, student: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        k, labels = len(self.rows), self._seen.all_labels
        if self.settings.choice == "random":
            chosen = np.random.default_rng([self.seed, step]).permutation(len(labels))[:k]
            return torch.from_numpy(np.sort(chosen)), torch.ones(k)
        slopes = self._slopes(student)
        members = [torch.nonzero(labels == c)[:, 0] for c in labels.unique()]
        rows, counts = [], []
        for mine, share in zip(members, even_shares([len(m) for m in members], k), strict=True):
            alike = likeness(slopes[mine])
            chosen = facility_location(alike, share)
            rows.append(mine[chosen])
            counts.append(stands_for(alike, chosen) if share else chosen)
        return torch.cat(rows), torch.cat(counts)

    @torch.no_grad()
    def _slopes(self, student: nn.Module) -> Tensor:
        """softmax(logits) - label of all images, (N, K): the gradient of each image's loss by its logits."""
        training, device = student.training, self.weights.device
        if training:
            student.eval()
        found = []
        for rows in torch.arange(len(self._all)).split(BATCH):
            logits = student(self._all.normalize(self._all.pixels[rows].to(device))).float()
            wanted = functional.one_hot(self._seen.all_labels[rows].to(device), logits.shape[1])
            found.append((logits.softmax(1) - wanted).cpu())
        if training:
            student.train()
        return torch.cat(found)
