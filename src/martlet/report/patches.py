"""Pictures of what became of an image's patches: kept as they are, merged into one color a token, dropped dark."""

from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import dataclass

from martlet.core.report import Patches

DROPPED = (24, 24, 24)
EDGE = (255, 255, 255)
"""Between patches of different tokens, where one of them is merged."""


@dataclass(frozen=True)
class Painted:
    """A picture after a block. kept: patches that stand alone; merged: those that share `tokens` tokens."""

    block: str
    kept: int
    merged: int
    tokens: int
    dropped: int
    jpeg_base64: str

    @property
    def text(self) -> str:
        total = self.kept + self.merged + self.dropped
        parts = [f"{self.kept} kept"]
        if self.merged:
            parts.append(f"{self.merged} merged into {self.tokens}")
        if self.dropped:
            parts.append(f"{self.dropped} dropped")
        return f"of {total} patches, {', '.join(parts)}"


def paint(picture: Patches) -> list[Painted]:
    """The image after each block that reduces tokens.

    The patches of one token take the mean color of all of them, with a white line to their neighbours.
    """
    import numpy as np
    from PIL import Image

    whole = Image.open(io.BytesIO(base64.b64decode(picture["jpeg_base64"]))).convert("RGB")
    down, across = picture["grid"]
    height, width = whole.height // down, whole.width // across
    pixels = np.asarray(whole)[: down * height, : across * width]
    painted: list[Painted] = []
    for block in picture["blocks"]:
        groups = np.array(block["groups"]).reshape(down, across)
        sizes = Counter(block["groups"])
        merged = np.array([group >= 0 and sizes[group] > 1 for group in block["groups"]]).reshape(down, across)
        of = groups.repeat(height, 0).repeat(width, 1)  # of each pixel
        canvas = pixels.copy()
        for group in np.unique(groups[merged]):
            canvas[of == group] = pixels[of == group].mean(0).round()
        canvas[of < 0] = DROPPED
        shared = merged.repeat(height, 0).repeat(width, 1)
        canvas[1:][(of[1:] != of[:-1]) & (shared[1:] | shared[:-1])] = EDGE
        canvas[:, 1:][(of[:, 1:] != of[:, :-1]) & (shared[:, 1:] | shared[:, :-1])] = EDGE
        buffer = io.BytesIO()
        Image.fromarray(canvas).save(buffer, "JPEG", quality=85, subsampling=0)
        painted.append(
            Painted(
                block=block["block"],
                kept=sum(1 for group in block["groups"] if group >= 0 and sizes[group] == 1),
                merged=int(merged.sum()),
                tokens=len(np.unique(groups[merged])),
                dropped=sizes[-1],
                jpeg_base64=base64.b64encode(buffer.getvalue()).decode("ascii"),
            )
        )
    return painted
