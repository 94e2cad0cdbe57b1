"""From a budget to a recipe: whole recipes, and the settings of each technique, by the engine's clock and by images.

What can be searched is the techniques' to say (`Technique.space`). Where a few models timed on the engine tell the time
of many settings, a technique names a `Space`, whose front is what recipes are drawn from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from martlet.recipe_search.whole import Search, search

__all__ = ["Search", "search"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from martlet.recipe_search import whole

    return getattr(whole, name)
