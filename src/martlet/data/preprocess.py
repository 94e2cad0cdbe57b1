"""How a model wants its images. PIL and NumPy only, so that an artifact runs without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from martlet.core.errors import ArtifactError, UsageError, nearest

if TYPE_CHECKING:
    from torch import Tensor

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
FITS = ("squash", "cover", "contain")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize, crop the center, scale to [0, 1], normalize. Bit for bit what torchvision and timm do to a PIL image.

    size: (H, W) that the model takes.
    resize: the shorter side in pixels, keeping the aspect; or a box (H, W); or None.
    fit: how an image meets the box of `resize`: `squash` to exactly that, keep the aspect and `cover` it, or keep the
    aspect and be `contain`ed in it, the border filled with the mean color (timm's crop modes squash, center, border).
    interpolation: one of INTERPOLATIONS.
    mean, std: of each of R, G, B, for values in [0, 1].

    Raises:
        UsageError: a value that is none of these.
    """

    size: tuple[int, int] = (224, 224)
    resize: int | tuple[int, int] | None = 256
    fit: str = "squash"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not _is_box(self.size):
            raise UsageError(f"preprocessing size is (height, width) in pixels, not {self.size!r}")
        if not (self.resize is None or _is_side(self.resize) or _is_box(self.resize)):
            raise UsageError(f"preprocessing resize is a side or (height, width) in pixels, not {self.resize!r}")
        if self.fit not in FITS:
            raise UsageError(f"preprocessing fit {self.fit!r} is none of {', '.join(FITS)}")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"interpolation {self.interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not (isinstance(values, tuple) and len(values) == 3 and all(map(_is_finite, values))):
                raise UsageError(f"preprocessing {name} is three numbers, for R, G and B, not {values!r}")
        if min(self.std) <= 0:
            raise UsageError(f"preprocessing std must be positive, not {self.std}")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Returns float32 (3, H, W)."""
        return self.normalize(self.crop(image))

    def crop(self, image: Image.Image) -> np.ndarray:
        """Resizes and crops. Returns uint8 (H, W, 3)."""
        image = image.convert("RGB")
        size = self._resized(*image.size)
        if size != image.size:
            image = image.resize(size, INTERPOLATIONS[self.interpolation])
        fill = tuple(round(255 * v) for v in self.mean) if self.fit == "contain" else (0, 0, 0)
        return np.asarray(_crop_center(image, self.size, fill))

    def normalize(self, array: np.ndarray) -> np.ndarray:
        """uint8 (..., H, W, 3) to float32 (..., 3, H, W)."""
        scaled = array.astype(np.float32) / np.float32(255)
        scaled = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))  # (..., 3, H, W)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (3, 1, 1), of values from 0 to 1."""
        import torch

        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return mean, std

    def renormalized(self, wanted: Preprocess) -> tuple[Tensor, Tensor]:
        """Scale and shift (3, 1, 1) from images normalized as here to what they are when normalized as wanted."""
        (mean0, std0), (mean1, std1) = self.statistics(), wanted.statistics()
        return std0 / std1, (mean0 - mean1) / std1

    def override(self, changes: Mapping[str, Any]) -> Preprocess:
        """A copy with some fields changed. A `size` without a `resize` scales the resize along, so that the crop
        keeps the same share of the image; one number for `size` is a square.

        Raises:
            UsageError: an unknown field or an impossible value.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise UsageError(f"preprocessing has no {name!r}{nearest(name, known)} (known: {', '.join(known)})")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        if _is_side(values.get("size")):
            values["size"] = (values["size"], values["size"])
        if _is_box(values.get("size")) and "resize" not in values:
            values = self._resize_for(values["size"]) | values
        return replace(self, **values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocess:
        """Raises:
        ArtifactError: unknown keys or impossible values.
        """
        known = {f.name for f in fields(cls)}
        if unknown := set(data) - known:
            raise ArtifactError(f"preprocessing has unknown keys {sorted(unknown)} (known: {sorted(known)})")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        try:
            return cls(**values)
        except UsageError as error:
            raise ArtifactError(str(error)) from None

    def _resized(self, w: int, h: int) -> tuple[int, int]:
        """(width, height) after the resize."""
        if isinstance(self.resize, int):
            # The longer side is cut, not rounded, as torchvision does.
            short, long = (w, h) if w <= h else (h, w)
            long = int(self.resize * long / short)
            return (self.resize, long) if w <= h else (long, self.resize)
        if self.resize is None:
            return w, h
        box_h, box_w = self.resize
        if self.fit == "squash":
            return box_w, box_h
        ratios = h / box_h, w / box_w
        ratio = min(ratios) if self.fit == "cover" else max(ratios)
        return max(1, round(w / ratio)), max(1, round(h / ratio))

    def _resize_for(self, size: tuple[int, int]) -> dict[str, Any]:
        """`resize` (and `fit`) for another size, the crop keeping the same share of the image."""
        (h, w), (old_h, old_w) = size, self.size
        if self.resize is None:
            return {}
        if isinstance(self.resize, tuple):
            return {"resize": (self.resize[0] * h // old_h, self.resize[1] * w // old_w)}
        h, w = (self.resize * side // min(old_h, old_w) for side in size)
        return {"resize": h} if h == w else {"resize": (h, w), "fit": "cover"}


def _crop_center(image: Image.Image, size: tuple[int, int], fill: tuple[int, ...]) -> Image.Image:
    """Crops, or pads where the image is smaller, as torchvision's center crop does."""
    h, w = size
    pad_w, pad_h = max(w - image.width, 0), max(h - image.height, 0)
    if pad_w or pad_h:
        padded = Image.new("RGB", (image.width + pad_w, image.height + pad_h), fill)
        padded.paste(image, (pad_w // 2, pad_h // 2))
        image = padded
    # Half pixels round to even, which is what Python's round gives torchvision too.
    left, top = round((image.width - w) / 2), round((image.height - h) / 2)
    return image.crop((left, top, left + w, top + h))


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_box(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_side, value))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
