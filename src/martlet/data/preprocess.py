"""How a model wants its images. PIL and NumPy only, so that an artifact runs without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from martlet.core.errors import ArtifactError, UsageError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize, crop the center, scale to [0, 1], normalize.

    size: (H, W) that the model takes.
    resize: the shorter side in pixels, keeping the aspect; or (H, W), which squashes; or None.
    interpolation: one of INTERPOLATIONS.
    mean, std: of each of R, G, B, for values in [0, 1].
    """

    size: tuple[int, int] = (224, 224)
    resize: int | tuple[int, int] | None = 256
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation {self.interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
        if min(self.size) < 1 or min(self.std) <= 0:
            raise UsageError(f"preprocessing needs a positive size and std, not {self.size} and {self.std}")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Returns float32 (3, H, W)."""
        image = image.convert("RGB")
        filter = INTERPOLATIONS[self.interpolation]
        if isinstance(self.resize, int):
            # The longer side is cut, not rounded, as torchvision does.
            w, h = image.size
            short, long = (w, h) if w <= h else (h, w)
            if short != self.resize:
                long = int(self.resize * long / short)
                image = image.resize((self.resize, long) if w <= h else (long, self.resize), filter)
        elif self.resize is not None:
            image = image.resize((self.resize[1], self.resize[0]), filter)
        array = np.asarray(_crop_center(image, self.size), dtype=np.float32) / np.float32(255)
        array = (array - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(array.transpose(2, 0, 1))  # (3, H, W)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocess:
        """Raises:
        ArtifactError: unknown keys.
        """
        known = {f.name for f in fields(cls)}
        if unknown := set(data) - known:
            raise ArtifactError(f"preprocessing has unknown keys {sorted(unknown)} (known: {sorted(known)})")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def _crop_center(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crops, or pads with black where the image is smaller, as torchvision's center crop does."""
    h, w = size
    pad_w, pad_h = max(w - image.width, 0), max(h - image.height, 0)
    if pad_w or pad_h:
        padded = Image.new("RGB", (image.width + pad_w, image.height + pad_h))
        padded.paste(image, (pad_w // 2, pad_h // 2))
        image = padded
    # Half pixels round to even, which is what Python's round gives torchvision too.
    left, top = round((image.width - w) / 2), round((image.height - h) / 2)
    return image.crop((left, top, left + w, top + h))


def shorter_side(size: tuple[int, int], crop_pct: float) -> int:
    """The side to resize to, in pixels, so that the crop keeps `crop_pct` of it (timm's rule)."""
    return math.floor(min(size) / crop_pct)
