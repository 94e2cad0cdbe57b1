"""In which blocks a model loses tokens, and how many.

Latency is nearly a sum over blocks, so a handful of models timed on the engine, and a block's products with weights for
every number of tokens, tell that of every schedule; what a schedule loses is computed on images in PyTorch, from the
first block that reduces on. Of numbers of tokens that are near each other, those are tried that the engine is fast at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from martlet.core.recipe import Recipe
from martlet.data.calibration import First
from martlet.recipe_search.rows import times_ms
from martlet.recipe_search.space import TIMED_ON, Loss, Space, front

if TYPE_CHECKING:
    from martlet.vit.tokens import TokenReduction

PARTS = 12
"""Of each of so many parts of the patches, one number of tokens left is tried."""
MOST_REDUCTIONS = 3
WIDTH = 32
"""How many schedules with one more reduction are tried: those that promise most."""

Schedule = tuple[tuple[int, int], ...]
"""Blocks, in their order, and the tokens that each removes."""


class Table(NamedTuple):
    """Latency of every schedule, from that of a few.

    base_ms: nothing removed. fixed_ms: what one reduction takes. rows_ms: by tokens removed, what products with weights
    take in one block; from none removed on, all that can be. rest_ms: by some numbers of tokens removed, in order, what
    one block saves besides. depth: of blocks that compute all their tokens.
    """

    base_ms: float
    fixed_ms: float
    rows_ms: tuple[float, ...]
    rest_ms: tuple[tuple[int, float], ...]
    depth: int

    @classmethod
    def of(
        cls,
        base_ms: float,
        early_ms: Mapping[int, float],
        half_ms: tuple[int, int, float],
        rows_ms: Sequence[float],
        depth: int,
    ) -> Table:
        """Solved for the parts.

        early_ms: by tokens removed, models that remove them in block 0, between its attention and its MLP, which counts
        as half a block. half_ms: block, tokens, time of a model that removes as many as one of these in a later block.
        """
        block, r, ms = half_ms
        saved = (ms - early_ms[r]) / block
        fixed = early_ms[r] - base_ms + (depth - 0.5) * saved
        by_removed = (
            (n, (base_ms + fixed - early) / (depth - 0.5) - (rows_ms[0] - rows_ms[n]))
            for n, early in sorted(early_ms.items())
        )
        return cls(base_ms, fixed, tuple(rows_ms), ((0, 0.0), *by_removed), depth)

    def latency_ms(self, schedule: Schedule) -> float:
        removed, saved = 0, 0.0
        for i, (block, r) in enumerate(schedule):
            after = schedule[i + 1][0] if i + 1 < len(schedule) else self.depth - 1
            half = (self._saved(removed) + self._saved(removed + r)) / 2
            removed += r
            saved += half + (after - block - (i + 1 < len(schedule))) * self._saved(removed)
        return self.base_ms + len(schedule) * self.fixed_ms - saved

    def _saved(self, removed: int) -> float:
        """What is left besides rows: between the measured points a line, past them the last one drawn on."""
        points = self.rest_ms
        right = next((i for i in range(1, len(points)) if removed <= points[i][0]), len(points) - 1)
        (a, at_a), (b, at_b) = points[right - 1], points[right]
        rest = at_a + (at_b - at_a) * (removed - a) / (b - a)
        return self.rows_ms[0] - self.rows_ms[removed] + rest


@dataclass
class Tokens(Space[Schedule]):
    """`r` of a technique that removes tokens."""

    basis: ClassVar[str] = "tps"

    def __post_init__(self) -> None:
        from martlet.vit.tokens import Taken

        self.taken = Taken(self.source)
        self.depth = len(self.taken.vit.blocks) - bool(self.taken.found.num_read)
        """Blocks in which a reduction changes something."""

    @property
    def technique(self) -> TokenReduction:
        return self.recipe.passes[self.position]  # type: ignore[return-value]

    def candidate(self, chosen: Schedule) -> Recipe:
        """The recipe with this schedule; with none, the last block still leaves out what nobody reads."""
        from martlet.techniques.tokens.readout import Readout

        return self.swapped(replace(self.technique, r=chosen) if chosen else Readout())

    def text(self, chosen: Schedule) -> str:
        """`4: 64, 8: 32`."""
        return ", ".join(f"{block}: {r}" for block, r in chosen)

    def time(self) -> None:
        """Times what the table is solved from, if that isn't on record."""
        data = self.record.data
        if "table" not in data:
            most = self.technique.most(self.taken.patches)
            grid = sorted({max(1, most // 2), most})
            half = max(1, self.depth // 2)
            schedules: dict[str, Schedule] = {"base": (), "half": ((half, grid[len(grid) // 2]),)}
            schedules |= {str(r): ((0, r),) for r in grid}
            for schedule in schedules.values():
                if schedule:
                    replace(self.technique, r=schedule).check(self.source)
            images, models = First(self.calibration, TIMED_ON), {}
            for i, (name, schedule) in enumerate(schedules.items()):
                self.progress("compress models to be timed", i, len(schedules))
                models[name] = self.compressed(schedule, images)
            times = self.times(models)
            first, number = self.taken.patches.first, self.taken.patches.number
            counts = range(first + number, first, -1)
            data["rows_ms"] = [*self.rows(counts).values()]
            data["table"] = {
                "base_ms": times.pop("base"),
                "half": [half, grid[len(grid) // 2], times.pop("half")],
                "early_ms": times,
                "depth": self.depth,
            }
            self.record.save()
        table = data["table"]
        early = {int(r): ms for r, ms in table["early_ms"].items()}
        self.table = Table.of(table["base_ms"], early, tuple(table["half"]), data["rows_ms"], table["depth"])

    def rows(self, counts: Sequence[int]) -> dict[int, float]:
        """Milliseconds of one block's products with weights, by how many tokens there are."""
        return times_ms(self.source, self.recipe, counts, self.engine, self.threads, self.context(self.calibration))

    def removed(self) -> list[int]:
        """Of each part of the patches that can go, the number at which a block is fastest."""
        number = self.taken.patches.number
        bounds = sorted({number * part // PARTS for part in range(PARTS)})
        spans = (range(low + 1, high + 1) for low, high in pairwise(bounds))
        return [min(span, key=lambda r: self.table.rows_ms[r]) for span in spans]

    def latency_ms(self, chosen: Schedule) -> float:
        return self.table.latency_ms(chosen)

    def loss(self, chosen: Schedule) -> Loss:
        return self.losses[chosen]

    def judge(self) -> None:
        """Computes the losses of schedules with one reduction, then of the most promising with one more, and so on."""
        grid = self.removed()
        singles = [((block, r),) for block in range(1, self.depth) for r in grid if self._fits(((block, r),))]
        self._lose(singles)
        for _ in range(1, MOST_REDUCTIONS):
            longer: dict[Schedule, float] = {}
            for schedule in self.front():
                gone = sum(r for _, r in schedule)
                for block in range(schedule[-1][0] + 2, self.depth):
                    for r in (total - gone for total in grid if total > gone):
                        alike = self.losses.get(((block, min(grid, key=lambda other: abs(other - r))),))
                        if alike is not None:
                            longer[*schedule, (block, r)] = self.losses[schedule].kl + alike.kl
            fits = [s for s in longer if s not in self.losses and self._fits(s)]
            losses = {s: longer[s] for s in fits} | {s: loss.kl for s, loss in self.losses.items()}
            best = front(losses, self.latency_ms, losses.__getitem__)
            chosen = [s for s in best if s not in self.losses]
            self._lose(chosen[:: max(1, len(chosen) // WIDTH)][:WIDTH])

    def front(self) -> list[Schedule]:
        """The judged schedules that no other beats in both, the fastest first."""
        return front(self.losses, self.latency_ms, lambda schedule: self.losses[schedule].kl)

    def _fits(self, schedule: Schedule) -> bool:
        """Whether so many can go, and it is faster."""
        from martlet.vit.tokens import Patches

        patches = self.taken.patches
        for _, r in schedule:
            if r > self.technique.most(patches):
                return False
            patches = Patches(patches.first, patches.number - r, None)
        return self.table.latency_ms(schedule) < self.table.base_ms

    def _lose(self, schedules: Sequence[Schedule]) -> None:
        """Losses of those that aren't on record."""
        import torch

        known = self.record.data.setdefault("losses", {})
        wanted = [s for s in schedules if self.text(s) not in known]
        if wanted:
            runs = {s: self.technique.run(self.taken.vit, self.taken.found, dict(s)) for s in wanted}
            logits: dict[Schedule, list[np.ndarray]] = {s: [] for s in wanted}
            reference: list[np.ndarray] = []
            with torch.inference_mode():
                for done, images in enumerate(self.pool):
                    before = self.taken.before(images)
                    reference.append(self.taken.logits(images, before[-1]).numpy())
                    for i, (schedule, run) in enumerate(runs.items()):
                        self.progress(
                            f"judge {len(wanted)} schedules",
                            done * len(wanted) + i,
                            len(wanted) * -(-self.pool.num_images // len(images)),
                        )
                        y = run(before[schedule[0][0]])
                        logits[schedule].append(self.taken.logits(images, y).numpy())
            whole = np.concatenate(reference)
            for schedule, parts in logits.items():
                known[self.text(schedule)] = Loss.of(whole, np.concatenate(parts))._asdict()
            self.record.save()
        self.losses |= {s: Loss(**known[self.text(s)]) for s in schedules}
