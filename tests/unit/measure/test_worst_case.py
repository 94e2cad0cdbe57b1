"""Images that are made to cost as much as they can."""

import math

import pytest
import torch

from martlet.core import pipeline
from martlet.core.errors import UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.graph.stages import leaves, run, stages, window
from martlet.measure.worst_case import worst_case
from martlet.source import load_model

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


@pytest.fixture
def model():
    source = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)
    recipe = Recipe.from_yaml("martlet: 1\npasses: [mue: {after: [1, 2]}]")
    return pipeline.traced(pipeline.run(source, recipe, Context()))


def test_images_cost_more_and_never_more_than_the_cap(model):
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        confidences = [[*given.values()][1] for given in run(stages(model.module), images)[:-1]]
    first, second = leaves(model.module)
    window(model.module, first).copy_(torch.tensor([-math.inf, float(confidences[0].min())]))  # all leave at once
    free = worst_case(model, images)
    assert free["mean_gmacs"] < free["attacked_mean_gmacs"] <= free["attacked_max_gmacs"] <= free["max_gmacs"]
    assert free["inflation"] > 1.2
    none = worst_case(model, images, epsilon=0.0)
    assert none["inflation"] == 1
    window(model.module, second).copy_(torch.tensor([math.inf, math.inf]))
    capped = worst_case(model, images)
    assert capped["attacked_max_gmacs"] <= capped["max_gmacs"] < free["max_gmacs"]


def test_a_model_that_cannot_stop_early():
    source = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)
    with pytest.raises(UsageError, match="can't stop early, so every image costs the same"):
        worst_case(source, torch.zeros(1, 3, 16, 16))
