"""What a teacher says of images as they will be changed, asked once and kept: students learn it without the teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from martlet.core.errors import UsageError
from martlet.core.kept import Kept
from martlet.core.technique import Progress
from martlet.data.examples import Examples
from martlet.training.objective import Batch, Teacher
from martlet.training.order import Order

HELD_BACK = -1
"""Stands for an epoch: the images that are judged by, as they are."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The k classes that a teacher finds most probable, in each epoch, of each image as its seed changes it.

    kept: a folder of one file an epoch, or None, which keeps them in memory. about: what they depend on but for the
    teacher, by name; files say it too.
    """

    top: int
    kept: Kept | None
    about: dict[str, str]
    teacher: str
    memory: dict[int, dict[str, Tensor]]

    def ask(
        self,
        teacher: Callable[[], Teacher],
        examples: Examples,
        judged: Examples,
        order: Order,
        epochs: int,
        change: tuple[str, float],
        progress: Progress,
    ) -> None:
        """Asks for what isn't there yet. change: how images are changed, as of `Examples.batch`.

        Raises:
            UsageError: the folder has answers to other images, changes or seeds, or of another teacher.
        """
        wanted = [*([HELD_BACK] if len(judged) else []), *range(epochs)]
        for i, epoch in enumerate(wanted):
            if self.read(epoch) is not None:
                continue
            progress("ask the teacher", i, len(wanted))
            part, (policy, erase) = (judged, ("none", 0.0)) if epoch == HELD_BACK else (examples, change)
            seeds = np.zeros(len(part), np.int64) if epoch == HELD_BACK else order.epoch(epoch)[1]
            values, classes = [], []
            its = teacher()
            device = next(its.model.module.parameters()).device
            for rows in np.array_split(np.arange(len(part)), -(-len(part) // order.batch)):
                images = part.normalize(part.batch(rows, seeds[rows], policy, erase).to(device))
                found = its(images).float().softmax(1).topk(self.top, 1)
                values.append(found.values.half().cpu())
                classes.append(found.indices.int().cpu())
            found = {"values": torch.cat(values), "classes": torch.cat(classes), "seeds": torch.from_numpy(seeds)}
            if self.kept is None:
                self.memory[epoch] = found
            else:
                self.kept.save(_key(epoch), found, {**self.about, "teacher": self.teacher})

    def read(self, epoch: int) -> dict[str, Tensor] | None:
        """values, classes (N, k) and seeds (N,) of an epoch; None if nobody was asked yet.

        Raises:
            UsageError: as `ask`.
        """
        if epoch in self.memory or self.kept is None:
            return self.memory.get(epoch)
        found = self.kept.load(_key(epoch))
        if found is None:
            return None
        tensors, told = found
        other = [name for name, its in {**self.about, "teacher": self.teacher}.items() if its and told.get(name) != its]
        if other:
            raise UsageError(
                f"{self.kept.folder} has a teacher's answers with another {' and '.join(other)}; give another folder"
            )
        self.memory.clear()  # one epoch at a time
        self.memory[epoch] = tensors
        return tensors

    def of(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """values and classes (B, k) of a batch's images.

        Raises:
            UsageError: these images were changed by other seeds.
        """
        found = self.read(epoch)
        assert found is not None
        rows = torch.from_numpy(batch.indices)
        if epoch != HELD_BACK and not torch.equal(found["seeds"][rows], torch.from_numpy(batch.seeds)):
            raise UsageError("the teacher saw these images changed by other seeds; give the --seed of that time")
        device = batch.images.device
        return found["values"][rows].float().to(device), found["classes"][rows].long().to(device)


def _key(epoch: int) -> str:
    return "held-back" if epoch == HELD_BACK else f"epoch-{epoch}"
