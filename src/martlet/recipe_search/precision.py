"""Which layers of an int8 model stay in floating point: where eight bits cost much accuracy and save little time.

What a layer takes in floating point and in int8 is read from the engine's account of each operation, in three models:
everything in int8, and every other layer in floating point, from the first on and from the second on. What its rounding
costs is the KL divergence of the logits with it alone rounded. Errors of layers are nearly independent, so both add up
well enough for an integer programme to say which layers to leave for any latency; what those choices lose is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from martlet.core import pipeline
from martlet.core.errors import UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Batches, Stage
from martlet.data.calibration import First
from martlet.functional.allocation import Choice, allocate_exactly
from martlet.recipe_search.space import TIMED_ON, Loss, Space, front

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from martlet.core.model import Model
    from martlet.engine.base import Op
    from martlet.techniques.quantize.int8 import Int8, Plan

JUDGED_ON = 64
"""Images on which each layer's rounding is judged: KL has no steps, so few are enough. They aren't those that ranges
follow from, if there are enough others."""
PROFILES = 5
"""Accounts of each model that are read, in turns; of an operation's times the median counts."""
POINTS = 32
"""Latencies for which the best choice is computed, close together near int8's."""

Unit = tuple[str, ...]
"""Names of what is rounded together or not at all: one layer, or the two products of an attention."""
Chosen = tuple[int, ...]
"""Places of the units in floating point, in their order."""


class Times(NamedTuple):
    """Latency of every choice, from that of three.

    base_ms: all in int8. int8_us, float_us: by unit, of its multiplications. scale: what a call takes longer over what
    its multiplications do; a float layer also changes where values are rounded and what is fused.
    """

    base_ms: float
    int8_us: tuple[float, ...]
    float_us: tuple[float, ...]
    scale: float

    @classmethod
    def of(
        cls,
        base_ms: float,
        halves_ms: Sequence[float],
        int8_us: Sequence[float],
        halves_us: Sequence[Sequence[float]],
    ) -> Times:
        """halves: two models, in which the units of even and of odd places are in floating point."""
        float_us = tuple(halves_us[i % 2][i] for i in range(len(int8_us)))
        operations, calls = sum(float_us) - sum(int8_us), 1000 * (sum(halves_ms) - 2 * base_ms)
        # Where floating point is as fast, the quotient is one of noise.
        scale = calls / operations if calls > 0 and operations > 0 else 1.0
        return cls(base_ms, tuple(int8_us), float_us, scale)

    def latency_ms(self, chosen: Chosen) -> float:
        return self.base_ms + self.scale * sum(self.float_us[i] - self.int8_us[i] for i in chosen) / 1000

    def choose(self, errors: Sequence[float], latency_ms: float) -> Chosen:
        """The units to leave, so that the errors of the others add up to the least within a time.

        Raises:
            ValueError: nothing is so fast.
        """
        layers = [
            [Choice(error, (rounded,)), Choice(0.0, (left,))]
            for error, rounded, left in zip(errors, self.int8_us, self.float_us, strict=True)
        ]
        budget = sum(self.int8_us) + 1000 * (latency_ms - self.base_ms) / self.scale
        return tuple(i for i, picked in enumerate(allocate_exactly(layers, [budget])) if picked)

    def points(self) -> list[float]:
        """Latencies from the least there is to that of everything in floating point, the closer the faster."""
        pairs = list(zip(self.int8_us, self.float_us, strict=True))
        least, most = (
            self.base_ms + self.scale * (sum(pick(p) for p in pairs) - sum(self.int8_us)) / 1000 for pick in (min, max)
        )
        least += 1e-9 * self.base_ms  # the solver's tolerance
        return [least + (most - least) * (i / POINTS) ** 2 for i in range(POINTS)]


class Precision(Space[Chosen]):
    """`float_layers` of `int8`."""

    basis: ClassVar[str] = "int8"

    @property
    def technique(self) -> Int8:
        return self.recipe.passes[self.position]  # type: ignore[return-value]

    @property
    def units(self) -> list[Unit]:
        return [tuple(names) for names in self.record.data["units"]]

    def names(self, chosen: Iterable[int]) -> list[str]:
        units = self.units
        return [name for i in chosen for name in units[i]]

    def candidate(self, chosen: Chosen) -> Recipe:
        return self.swapped(replace(self.technique, float_layers=(*self.technique.float_layers, *self.names(chosen))))

    def text(self, chosen: Chosen) -> str:
        """`blocks.0.mlp.fc2, head`."""
        return ", ".join(self.names(chosen))

    def compressed(self, chosen: Chosen, images: Batches) -> Model:
        """As of a recipe from the beginning; what comes before int8 is done once for all."""
        return pipeline.run(self.before, Recipe(self.candidate(chosen).passes[self.position :]), self.context(images))

    @cached_property
    def before(self) -> Model:
        """The model as int8 gets it."""
        recipe = Recipe(self.recipe.passes[: self.position])
        model = pipeline.run(self.source, recipe, self.context(self.calibration))
        model = model if recipe.passes else model.copy()
        pipeline.enter_(model, Stage.GRAPH)
        self.technique.check(model)
        return model

    def time(self) -> None:
        """Times three models, of which the times of all choices follow, if they aren't on record."""
        data = self.record.data
        if "times" not in data:
            data["units"] = _units(self.before.module, self.technique)  # type: ignore[arg-type]
            if len(data["units"]) < 2:
                raise UsageError(f"int8 rounds one layer of {self.source.name}, so there is nothing to choose")
            images, models = First(self.calibration, TIMED_ON), {}
            places = range(len(data["units"]))
            for i, chosen in enumerate(((), tuple(places[::2]), tuple(places[1::2]))):
                self.progress("compress models to be timed", i, 3)
                models[str(i)] = self.compressed(chosen, images)
            ms, us = self.clock(models)
            data["times"] = {"ms": ms, "us": us}
            self.record.save()
        ms, us = data["times"]["ms"], data["times"]["us"]
        self.table = Times.of(ms[0], ms[1:], us[0], us[1:])

    def clock(self, models: Mapping[str, Model]) -> tuple[list[float], list[list[float]]]:
        """Median milliseconds of each model, interleaved; and microseconds by unit, medians too."""
        with self.opened(models) as sessions:
            ms = self.turns(sessions)
            probe, accounts = self.probe(), {name: list[list[float]]() for name in sessions}
            for i in range(PROFILES):
                self.progress("read times of operations", i, PROFILES)
                for name, session in sessions.items():
                    accounts[name].append(unit_times(session.profile(probe), self.units))
        return [ms[name] for name in models], [np.median(accounts[name], axis=0).tolist() for name in models]

    def judge(self) -> None:
        """Computes errors of units rounded alone, and losses of the choices that follow, unless they are on record."""
        data, every = self.record.data, range(len(self.units))
        if "errors" not in data:
            data["errors"] = [loss.kl for loss in self._losses([[i] for i in every], "round each layer alone")]
            self.record.save()
        self.errors: list[float] = data["errors"]
        known = data.setdefault("losses", {})
        if wanted := [c for c in self.choices() if self.text(c) not in known]:
            rounded = [[i for i in every if i not in c] for c in wanted]
            losses = self._losses(rounded, f"judge {len(wanted)} choices of layers")
            known |= {self.text(c): loss._asdict() for c, loss in zip(wanted, losses, strict=True)}
            self.record.save()
        self.losses |= {text: Loss(**loss) for text, loss in known.items()}

    @cached_property
    def rounding(self) -> tuple[GraphModule, list[dict[Node, Callable[..., Tensor]]]]:
        """The graph before anything is rounded; and by unit what rounds it, as `changed_logits` takes it."""
        from martlet.graph.rewrite.layout import uncut

        graph: GraphModule = self.before.copy().module  # type: ignore[assignment]
        plan: Plan = self.technique.plan_(graph, self.context(self.calibration))
        unit_of = {name: i for i, unit in enumerate(self.units) for name in unit}
        found: list[dict[Node, Callable[..., Tensor]]] = [{} for _ in self.units]
        for site in plan.sites:
            found[unit_of[uncut(site.name)]][site.node] = plan.rounded(site)
        return graph, found

    def _losses(self, rounded: Sequence[Sequence[int]], what: str) -> list[Loss]:
        """Losses against the exact logits with only those units rounded, in PyTorch."""
        from martlet.graph.sensitivity import changed_logits

        graph, calls = self.rounding
        groups = [{node: call for i in units for node, call in calls[i].items()} for units in rounded]
        seen = max(0, min(self.calibration.num_images, self.pool.num_images - JUDGED_ON))
        images, reference = First(self.pool, JUDGED_ON, seen), list[np.ndarray]()
        logits: list[list[np.ndarray]] = [[] for _ in groups]
        for batch in images:
            self.progress(what, sum(map(len, reference)), images.num_images)
            exact, found = changed_logits(graph, batch, groups)
            reference.append(exact.numpy())
            for parts, its in zip(logits, found, strict=True):
                parts.append(its.numpy())
        return [Loss.of(np.concatenate(reference), np.concatenate(parts)) for parts in logits]

    def latency_ms(self, chosen: Chosen) -> float:
        return self.table.latency_ms(chosen)

    def loss(self, chosen: Chosen) -> Loss:
        return self.losses[self.text(chosen)]

    def front(self) -> list[Chosen]:
        return front(self.choices(), self.latency_ms, lambda c: self.loss(c).kl)

    def choices(self) -> list[Chosen]:
        """The best by the sum of errors, the fastest first; all in int8 is one of them."""
        found = {self.table.choose(self.errors, ms) for ms in self.table.points()} | {()}
        return front(found - {tuple(range(len(self.units)))}, self.latency_ms, self._left)

    def _left(self, chosen: Chosen) -> float:
        """The errors that remain, as a sum."""
        return sum(self.errors) - sum(self.errors[i] for i in chosen)


def unit_times(ops: Iterable[Op], units: Sequence[Unit]) -> list[float]:
    """Microseconds of each unit's multiplications. An operation that runs several shares its time among them evenly."""
    from martlet.graph.rewrite.layout import uncut

    unit_of = {name: i for i, unit in enumerate(units) for name in unit}
    found = [0.0] * len(units)
    for op in ops:
        names = op.name.split(" + ") if op.macs else []
        for name in names:
            if (place := unit_of.get(uncut(name))) is not None:
                found[place] += op.microseconds / len(names)
    return found


def _units(graph_module: GraphModule, technique: Int8) -> list[list[str]]:
    """What int8 rounds, in the order of execution; an attention's products go together, as engines run them as one."""
    from martlet.graph.attention import attentions
    from martlet.graph.sites import sites

    scores_of = {attention.values: attention.scores for attention in attentions(graph_module)}
    found: dict[object, list[str]] = {}
    for site in sites(graph_module):
        if technique.rounds(site):
            found.setdefault(scores_of.get(site.node, site.node), []).append(site.name)
    return list(found.values())
