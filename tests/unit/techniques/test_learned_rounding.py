"""What a user may say of learning: the loss, what is free, the optimizer; and the preset that says all three."""

import itertools
import re

import pytest
import torch
from tiny import compress, images, logits, model

from martlet.core import registry
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.graph.low_bit import LowBit


def compressed(**settings: object) -> Model:
    settings = {"weight_bits": 3, "activation_bits": 8, "ranges": "mse", "steps": 40} | settings
    return compress(model("class token"), "uniform", **settings)


@pytest.mark.parametrize("freedom", ["rounding", "weights", "all"])
@pytest.mark.parametrize("optimizer", ["adam", pytest.param("adamax", marks=pytest.mark.slow)])
def test_blocks_err_less_whatever_is_free_and_moves_it(freedom: str, optimizer: str) -> None:
    blocks = compressed(freedom=freedom, optimizer=optimizer).steps[0].record["blocks"]
    assert len(blocks) == 3
    assert sum(block["after"] for block in blocks) < 0.95 * sum(block["before"] for block in blocks)


def test_each_choice_makes_a_difference() -> None:
    tried = ({}, {"freedom": "weights"}, {"optimizer": "adamax"})
    found = [logits(compressed(steps=5, weight_bits=2, **changes).module, images()) for changes in tried]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"freedom": "scales"}, "freedom is 'scales'; it can be rounding, weights, all"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it can be adam, adamax"),
    ],
)
def test_unknown_choices_are_one_clear_error(settings: dict[str, str], text: str) -> None:
    with pytest.raises(RecipeError, match=f"^uniform: {re.escape(text)}$"):
        registry.technique("uniform")(**settings)


def test_is_vit_still_frees_its_weights() -> None:
    technique = registry.technique("is_vit")(**{"steps": 3})
    assert isinstance(technique, LowBit)
    assert technique.learning().freedom == "weights"
    assert technique.learning().float_rate > 0


@pytest.mark.parametrize("name", ["adaround", "gradient-ptq"])
def test_recipes_round_weights_to_4_bits_and_activations_to_8(name: str) -> None:
    [technique] = [t for t in Recipe.load(name).passes if isinstance(t, LowBit)]
    assert (technique.weight_bits, technique.activation_bits) == (4, 8)
    assert technique.steps > 0
