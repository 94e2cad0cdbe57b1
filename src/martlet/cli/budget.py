"""Options for budgets of models that can stop early."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from martlet.core.errors import UsageError

if TYPE_CHECKING:
    from martlet.core.recipe import Recipe


def _limit(metavar: str, text: str) -> Any:
    return Option(min=0, metavar=metavar, help=text, rich_help_panel="Stopping early", show_default=False)


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """What a model with exits may cost and lose; thresholds are solved for it on the calibration images."""

    mean_latency_ms: Annotated[float | None, _limit("MS", "Of an image in the mean, at batch 1, at most.")] = None
    max_latency_ms: Annotated[float | None, _limit("MS", "Of any image, whatever it shows, at most.")] = None
    mean_gmacs: Annotated[float | None, _limit("N", "The same in 10⁹ multiply-accumulates.")] = None
    max_gmacs: Annotated[float | None, _limit("N", "The same in 10⁹ multiply-accumulates.")] = None
    max_risk: Annotated[
        float | None, _limit("PCT", "Of wrong answers, that other images exceed with a probability of 5 % at most.")
    ] = None

    def apply(self, recipe: Recipe, max_drop: float | None) -> Recipe:
        """The recipe with the budgets that were given in the pass that sets thresholds.

        max_drop: points of top-1; only what sets thresholds and names no drop of its own takes it.

        Raises:
            RecipeError: a budget that can't be.
            UsageError: no pass sets thresholds.
        """
        from martlet.core.recipe import Recipe
        from martlet.techniques.exits.deer import DeeR

        given = {name: value for name, value in asdict(self).items() if value is not None}
        if "max_risk" in given:
            given["max_risk_pct"] = given.pop("max_risk")
        if given and not any(isinstance(technique, DeeR) for technique in recipe.passes):
            option = next(name for name, value in asdict(self).items() if value is not None).replace("_", "-")
            raise UsageError(
                f"--{option} is for models that can stop early, and {recipe} sets no thresholds; take the recipe "
                "exits-int8, or add exits and deer, as in `lgvit | int8 | deer`"
            )

        def limited(technique: DeeR) -> DeeR:
            drop = max_drop if technique.max_drop is None else technique.max_drop
            return replace(technique, **given, max_drop=drop)

        return Recipe(tuple(limited(each) if isinstance(each, DeeR) else each for each in recipe.passes))
