"""Pictures for reports, and what is seen on them."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import PIL.Image


def class_name(names: tuple[str, ...] | None, i: int) -> str:
    """The i-th class by its name, or its number, if it has none."""
    return names[i] if names and i < len(names) else str(i)


def thumbnail(image: PIL.Image.Image) -> str:
    """A JPEG of at most 160 pixels a side, as base64."""
    small = image.convert("RGB")
    small.thumbnail((160, 160))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
