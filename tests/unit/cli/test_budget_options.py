"""Budgets of models that can stop early, from the command line into the recipe."""

import pytest

from martlet.cli.budget import BudgetOptions
from martlet.core.errors import RecipeError, UsageError
from martlet.core.recipe import Recipe


def test_a_budget_goes_into_the_pass_that_sets_thresholds():
    recipe = BudgetOptions(mean_latency_ms=2.5, max_risk=10.0).apply(Recipe.load("lgvit | int8 | deer"), None)
    assert recipe.passes[-1].settings() == {"mean_latency_ms": 2.5, "max_risk_pct": 10.0}
    assert recipe.passes[:-1] == Recipe.load("lgvit | int8").passes


def test_a_drop_is_for_the_gate_and_for_the_thresholds_unless_they_have_their_own():
    assert BudgetOptions().apply(Recipe.load("deer"), 0.5).passes[0].max_drop == 0.5
    own = Recipe.from_yaml("martlet: 1\npasses: [deer: {max_drop: 2.0}]")
    assert BudgetOptions().apply(own, 0.5) == own
    plain = Recipe.load("int8")
    assert BudgetOptions().apply(plain, 0.5) == plain


def test_a_budget_without_exits_is_refused():
    with pytest.raises(
        UsageError, match=r"--max-latency-ms is for models that can stop early, and .* sets no thresholds"
    ):
        BudgetOptions(max_latency_ms=1.0).apply(Recipe.load("int8"), None)


def test_a_budget_that_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="a mean of 3 ms is more than the 2 that any image may cost"):
        BudgetOptions(mean_latency_ms=3.0, max_latency_ms=2.0).apply(Recipe.load("exits-int8"), None)
