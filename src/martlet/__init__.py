"""Martlet: any vision model in, with a budget; a deployable file out, with measured proof."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from martlet.core.errors import MartletError
    from martlet.core.recipe import Recipe
    from martlet.core.store import Artifact, load
    from martlet.core.technique import Technique
    from martlet.job import compress, evaluate
    from martlet.recipe_search import search
    from martlet.source import load_model

_PUBLIC = {
    "Artifact": "martlet.core.store",
    "MartletError": "martlet.core.errors",
    "Recipe": "martlet.core.recipe",
    "Technique": "martlet.core.technique",
    "compress": "martlet.job",
    "evaluate": "martlet.job",
    "load": "martlet.core.store",
    "load_model": "martlet.source",
    "search": "martlet.recipe_search",
}

__all__ = [
    "Artifact",
    "MartletError",
    "Recipe",
    "Technique",
    "__version__",
    "compress",
    "evaluate",
    "load",
    "load_model",
    "search",
]


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used, so that `import martlet` stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'martlet' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
