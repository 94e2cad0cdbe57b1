"""Images that are made to cost as much as they can."""

import itertools
import math
import sys

import pytest
import torch
from torch import Tensor

from martlet.core import pipeline
from martlet.core.errors import UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.graph.stages import leaves, run, stages, window
from martlet.measure.worst_case import worst_case
from martlet.source import load_model

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
MODULE = sys.modules["martlet.measure.worst_case"]


def images(n: int = 8) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Calibration:
    num_images = 8

    def __iter__(self):
        yield images()


@pytest.fixture(scope="module")
def source() -> Model:
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)


@pytest.fixture(scope="module")
def model(source) -> Model:
    """With two exits, whose windows each test sets."""
    recipe = Recipe.from_yaml("martlet: 1\npasses: [mue: {after: [1, 2]}]")
    return pipeline.traced(pipeline.run(source, recipe, Context()))


@torch.no_grad()
def confidences(model: Model) -> Tensor:
    """(2, B)."""
    return torch.stack([[*given.values()][1] for given in run(stages(model.module), images())[:-1]])


def set_windows_(model: Model, *windows: tuple[float, float]) -> None:
    for exit_, bounds in zip(leaves(model.module), windows, strict=True):
        window(model.module, exit_).copy_(torch.tensor(bounds))


def below(sure: Tensor) -> float:
    """A bit less than the least sure."""
    return float(sure.min() - (sure.max() - sure.min()) / 100)


def test_images_cost_more_and_never_more_than_the_cap(model):
    first, _ = confidences(model)
    set_windows_(model, (-math.inf, below(first)), (-math.inf, math.inf))  # all leave at once
    free = worst_case(model, images())
    assert free["mean_gmacs"] < free["attacked_mean_gmacs"] <= free["attacked_max_gmacs"] <= free["max_gmacs"]
    assert free["inflation"] > 1.2
    none = worst_case(model, images(), epsilon=0.0)
    assert none["inflation"] == 1
    set_windows_(model, (-math.inf, below(first)), (math.inf, math.inf))
    capped = worst_case(model, images())
    assert capped["mean_gmacs"] < capped["attacked_max_gmacs"] <= capped["max_gmacs"] < free["max_gmacs"]


def test_images_that_leave_because_they_are_unsure_are_made_surer(model):
    first, _ = confidences(model)
    spread = float(first.max() - first.min())
    set_windows_(model, (float(first.max()) + spread / 100, math.inf), (-math.inf, math.inf))
    assert worst_case(model, images())["inflation"] > 1.2


def sure_of(monkeypatch, unit) -> None:
    """Every exit tells something else than it does, of its confidence (B,)."""

    def told(parts, x):
        given = run(parts, x)
        for one in given[:-1]:
            _, confidence, *_ = one
            one[confidence] = unit(one[confidence])
        return given

    monkeypatch.setattr(MODULE, "run", told)


@pytest.mark.parametrize("unit", [lambda c: 2 * c - 3, torch.log, lambda c: -1 / c])
def test_how_an_exit_tells_that_it_is_sure_makes_no_difference(unit, model, monkeypatch):
    """Below zero as a cosine can be, or on another scale, as long as it rises."""
    sure = confidences(model)
    bounds = [below(each) for each in sure]
    set_windows_(model, *((-math.inf, bound) for bound in bounds))
    wanted = worst_case(model, images())
    assert wanted["inflation"] > 1.2
    set_windows_(model, *((-math.inf, float(unit(torch.tensor(bound)))) for bound in bounds))
    sure_of(monkeypatch, unit)
    assert (unit(sure) < 0).all()
    assert worst_case(model, images()) == wanted


def test_what_an_image_has_cost_once_counts(model, monkeypatch):
    """Though later steps move it to where it would leave at once."""
    set_windows_(model, *((-math.inf, below(each)) for each in confidences(model)))
    wanted = worst_case(model, images(), steps=3)
    assert wanted["inflation"] > 1.2
    asked = itertools.count()
    sure_of(monkeypatch, lambda c: c + 10 * (next(asked) >= 2 * 4))  # two exits, and what three steps and the end ask
    assert worst_case(model, images(), steps=6) == wanted


def test_gradients_pass_what_is_rounded(source):
    recipe = Recipe.from_yaml("martlet: 1\npasses: [mue: {after: [1, 2]}, int8]")
    rounded = pipeline.run(source, recipe, Context(images=Calibration()))
    first, _ = confidences(rounded)
    set_windows_(rounded, (-math.inf, below(first)), (-math.inf, math.inf))
    before = rounded.module(images())
    assert worst_case(rounded, images())["inflation"] > 1.2
    assert torch.equal(rounded.module(images()), before)  # and the model is as it was


def test_a_model_that_cannot_stop_early(source):
    with pytest.raises(UsageError, match="can't stop early, so every image costs the same"):
        worst_case(source, images(1))
