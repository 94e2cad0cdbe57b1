"""Runs a recipe over a model; and runs it again, without data, when an artifact is reloaded."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from martlet.core.model import Model, Step
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Stage, Technique

if TYPE_CHECKING:
    from martlet.data.preprocess import Preprocess


def run(
    model: Model, recipe: Recipe, context: Context, after: Callable[[Model, Technique], None] | None = None
) -> Model:
    """Applies every pass, in order, to a copy. The model given is left as it was.

    after: is shown the model after each pass, and must leave it as it is.

    Raises:
        RecipeError: the order can't work on this model; raised before anything is computed.
        MartletError: what a technique's `check` or `apply_` raises.
    """
    facts = recipe.facts(model.facts)
    context = replace(context, teacher=context.teacher or model)
    if recipe.passes:
        model = model.copy()
    for i, technique in enumerate(recipe.passes):
        context.progress(technique.summary, i, len(recipe.passes))
        enter_(model, technique.stage)
        technique.check(model)
        start, preprocess = time.perf_counter(), model.preprocess
        record = technique.apply_(model, context)
        model.steps.append(Step(technique=technique, record=record, seconds=time.perf_counter() - start))
        if model.preprocess != preprocess:
            context = _at(context, model.preprocess)
        if after is not None:
            after(model, technique)
    model.facts = facts
    return model


def _at(context: Context, preprocess: Preprocess) -> Context:
    """The context for a model that wants its images otherwise."""
    from martlet.data.calibration import Resized

    images, apart, training = context.images, context.apart, context.training
    return replace(
        context,
        images=None if images is None else Resized(images, preprocess),
        apart=None if apart is None else Resized(apart, preprocess),
        training=None if training is None else training.at(preprocess),
    )


def restore_(model: Model, steps: Iterable[Step]) -> None:
    """Rebuilds, on a model fresh from `source.rebuild`, the structure that the steps once left. No data needed."""
    for step in steps:
        enter_(model, step.technique.stage)
        step.technique.restore_(model, step.record)
        model.steps.append(step)
    model.facts = Recipe(tuple(step.technique for step in model.steps)).facts()


def traced(model: Model) -> Model:
    """A twin whose module is the traced graph, with the model's own tensors; for those who read it, not to be changed.

    A trace takes seconds, so whoever asks several things of a model's graph asks them of one twin.
    """
    twin = copy.copy(model)
    enter_(twin, Stage.GRAPH)
    return twin


def enter_(model: Model, stage: Stage) -> None:
    """Traces the module when a graph technique comes first."""
    if stage is Stage.GRAPH and model.stage is Stage.MODULE:
        from martlet.graph.trace import trace

        model.module = trace(model.module, model.preprocess.size)
        model.stage = Stage.GRAPH
