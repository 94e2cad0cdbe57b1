"""Who sees which images in which step, how each is changed, and what chance is: from the seed, whatever came before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True, kw_only=True)
class Order:
    """Epochs of n images in batches, which several processes share.

    batch: images in a step, of all processes. rank: of `world` processes, which one.
    """

    n: int
    batch: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def per_epoch(self) -> int:
        """Steps. What doesn't fill a batch waits for another epoch's order."""
        return self.n // self.batch

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the images, and by image the seed of its change: int64 (n,) each."""
        rng = np.random.default_rng([self.seed, epoch])
        return rng.permutation(self.n), rng.integers(2**62, size=self.n)

    def steps(self, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Indices and seeds of this process's images in each step from `start` on, without end."""
        while True:
            epoch, first = divmod(start, self.per_epoch)
            order, seeds = self.epoch(epoch)
            for i in range(first, self.per_epoch):
                chosen = order[i * self.batch : (i + 1) * self.batch][self.rank :: self.world]
                yield chosen, seeds[chosen]
            start = (epoch + 1) * self.per_epoch


def seed_(*parts: int) -> None:
    """Sets the generators of Python, NumPy and torch from numbers at least 0."""
    state = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Generators of Python, NumPy and torch are after the block what they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def processes() -> PartialState:
    """Those that a launcher started, or this one alone. On CPUs they find each other only if told that it is CPUs."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
