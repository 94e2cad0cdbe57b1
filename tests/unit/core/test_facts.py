"""What techniques require and break follows from their stage and their own words."""

import pytest

from martlet.core.facts import ALL_FACTS, Fact
from martlet.core.recipe import Recipe
from martlet.core.registry import technique
from martlet.core.technique import Stage

WHOLE = {Fact.ALL_TOKENS, Fact.ONE_EXIT, Fact.WHOLE_LINEARS}
"""What rounding leaves as it is."""


def test_stages_exclude_the_ones_before():
    assert Fact.MODULE in Stage.GRAPH.breaks
    assert {Fact.MODULE, Fact.GRAPH} <= Stage.ENGINE.breaks
    assert not Stage.MODULE.breaks
    for stage in Stage:
        assert not stage.requires & stage.breaks


def test_a_technique_has_the_facts_of_its_stage_and_its_own():
    int8 = technique("int8")
    assert int8.requires == {Fact.GRAPH, Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS}
    assert int8.breaks == {Fact.MODULE, Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS, Fact.UNFUSED}


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        ("none", ALL_FACTS),
        ("fuse", ALL_FACTS - {Fact.UNFUSED}),
        ("bf16", {*WHOLE, Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS}),
        ("int8-f32", {*WHOLE, Fact.GRAPH, Fact.FREE_PRECISION}),
        ("int8", WHOLE),
    ],
)
def test_what_is_left_after_a_recipe(spec, left):
    assert Recipe.load(spec).facts() == left


def test_facts_start_from_the_models():
    start = ALL_FACTS - {Fact.FREE_PRECISION}
    assert Recipe.load("fuse").facts(start) == start - {Fact.UNFUSED}
