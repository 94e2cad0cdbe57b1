"""Every error a user can cause or meet, one line each, and the exit status it leaves."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class MartletError(Exception):
    """What went wrong and what to type instead, in one line. Never shown with a traceback."""

    exit_status: ClassVar[int] = 1


class UsageError(MartletError):
    """The call was wrong: an unknown name, an impossible option, a folder in the way."""

    exit_status: ClassVar[int] = 2


class SourceError(UsageError):
    """A model or its weights can't be loaded as asked."""


class RecipeError(UsageError):
    """A recipe has an unknown key, a bad value, or an order that can't work."""


class DataError(UsageError):
    """Images are missing, unreadable, or don't fit the model."""


class EngineError(MartletError):
    """An engine isn't installed, or refuses the model."""


class NumericsError(MartletError):
    """A model gives NaN or infinity."""


class ArtifactError(MartletError):
    """An artifact folder is incomplete, damaged, or of another version."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """`'; did you mean a, b?'` for the closest known names, or the empty string."""
    close = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
