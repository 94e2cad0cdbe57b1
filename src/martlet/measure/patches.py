"""What has become of the patches of a few images, block by block, for the page to paint."""

from __future__ import annotations

import base64
import io
from itertools import islice

import numpy as np

from martlet.core.model import Model
from martlet.core.report import Patches
from martlet.data.images import Images

NUM_IMAGES = 4
SIDE = 168
"""Pixels of the longer side of a picture, about."""


def patches(model: Model, images: Images, n: int = NUM_IMAGES) -> list[Patches]:
    """Of the first n images; empty if the model reduces no tokens.

    The model decides as it is, in floating point: what is rounded later may decide otherwise here and there.
    """
    import torch
    from PIL import Image

    from martlet.vit.groups import groups

    crops = [(record.name, crop) for record, crop in islice(images.map(model.preprocess.crop), n)]
    if not crops:
        return []
    batch = model.preprocess.normalize(np.stack([crop for _, crop in crops]))  # (B, 3, H, W)
    found = groups(model, torch.from_numpy(batch))
    pictures: list[Patches] = []
    for i, (name, crop) in enumerate(crops if found else []):
        down, across = found[0].grid
        cell = max(SIDE // max(down, across), 1)
        buffer = io.BytesIO()
        small = Image.fromarray(crop).resize((across * cell, down * cell), Image.Resampling.BOX)
        small.save(buffer, "JPEG", quality=85)
        pictures.append(
            {
                "image": name,
                "jpeg_base64": base64.b64encode(buffer.getvalue()).decode("ascii"),
                "grid": [down, across],
                "blocks": [
                    {"block": each.block, "num_tokens": each.num_tokens, "groups": each.of[i].tolist()}
                    for each in found
                ],
            }
        )
    return pictures
