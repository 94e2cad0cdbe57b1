"""Examples: images to train on, decoded once, and augmented by a seed of their own each time they are seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional

from martlet.core.errors import DataError, RecipeError
from martlet.core.kept import digest
from martlet.core.technique import Batches, Progress, silent
from martlet.data.calibration import resize
from martlet.data.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL import Image

    from martlet.data.images import Images

HELD_RATIO = 0.5
"""Of the memory that is free, what decoded images may not take."""
MARGIN = 8
"""A side over this is how far `crop` moves an image."""
SAMPLED = 256
"""Images that a digest looks at."""
AUGMENTS = ("none", "crop")
BATCH = 32
"""Images that are normalized together."""


class Examples:
    """Images as the model takes them, and their labels, held in memory as bytes.

    pixels: uint8 (N, 3, H, W). labels: int64 (N,), or None. source: as the user typed it.
    """

    def __init__(self, pixels: Tensor, labels: Tensor | None, preprocess: Preprocess, source: str) -> None:
        self.pixels, self.labels, self.preprocess, self.source = pixels, labels, preprocess, source
        self._transforms: dict[str, Callable[[Image.Image], Tensor]] = {}

    @classmethod
    def read(cls, images: Images, preprocess: Preprocess, num_classes: int, progress: Progress = silent) -> Examples:
        """Decodes all images that can be read.

        Raises:
            DataError: they don't fit into memory, too many or all can't be read, or a label is no class of the model.
        """
        images.check_labels(num_classes)
        need = len(images) * 3 * preprocess.size[0] * preprocess.size[1]
        free = psutil.virtual_memory().available
        if need > (1 - HELD_RATIO) * free:
            fit = int((1 - HELD_RATIO) * free / need * len(images))
            raise DataError(
                f"{len(images)} images of {images.source} take {need / 1e9:.1f} GB decoded, and {free / 1e9:.1f} GB "
                f"are free; at most {fit} fit, so give fewer"
            )
        pixels = torch.empty(len(images), 3, *preprocess.size, dtype=torch.uint8)
        labels: list[int | None] = []
        for record, crop in images.map(preprocess.crop):
            pixels[len(labels)] = torch.from_numpy(np.array(crop)).movedim(-1, 0)
            labels.append(record.label)
            progress("decode training images", len(labels), len(images))
        if not labels:
            raise DataError(f"{images.source} has no image that can be read")
        known = [label for label in labels if label is not None]
        whole = torch.tensor(known) if len(known) == len(labels) else None
        return cls(pixels[: len(labels)], whole, preprocess, images.source)

    @classmethod
    def unlabelled(cls, batches: Iterable[Tensor], preprocess: Preprocess) -> Examples:
        """From preprocessed images, float32 (B, 3, H, W), which are made bytes again."""
        mean, std = preprocess.statistics()
        pixels = [((batch * std + mean) * 255).round().clamp(0, 255).to(torch.uint8) for batch in batches]
        return cls(torch.cat(pixels), None, preprocess, "calibration images")

    def __len__(self) -> int:
        return len(self.pixels)

    def at(self, preprocess: Preprocess) -> Examples:
        """The same images at another size, resized from what was decoded."""
        if preprocess.size == self.preprocess.size:
            return Examples(self.pixels, self.labels, preprocess, self.source)
        resized = (resize(part.float(), preprocess.size) for part in self.pixels.split(SAMPLED))
        pixels = torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in resized])
        return Examples(pixels, self.labels, preprocess, self.source)

    def split(self, n: int, seed: int) -> tuple[Examples, Examples]:
        """n of them, drawn by the seed, and the others."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self)))
        return self.take(order[:n].sort().values), self.take(order[n:].sort().values)

    def take(self, rows: Tensor) -> Examples:
        """Some of them: rows int64 (n,)."""
        labels = None if self.labels is None else self.labels[rows]
        return Examples(self.pixels[rows], labels, self.preprocess, self.source)

    def batches(self, n: int, seed: int) -> Batches:
        """n of them, drawn by the seed, as what looks at calibration images takes them."""
        return _Normalized(self.split(min(n, len(self)), seed)[0])

    @cached_property
    def digest(self) -> str:
        """Changes with the labels, the number of images, how they are preprocessed, and any of some of their pixels."""
        some = self.pixels[:: max(1, len(self) // SAMPLED)]
        labels = [] if self.labels is None else [self.labels]
        return digest([some, *labels, repr(self.preprocess), str(len(self))])

    def batch(self, indices: np.ndarray, seeds: np.ndarray, augment: str = "none", erase: float = 0.0) -> Tensor:
        """Images (B, 3, H, W), each changed by its own seed: the same seed changes it in the same way.

        indices, seeds: int64 (B,). augment: `none`; `crop`, moved by up to an eighth of a side, and half of them
        mirrored; or timm's name of an augmentation policy, after a random resized crop and a mirroring. erase: the
        probability of a rectangle of noise, with timm's policies.

        Returns uint8, to be normalized; float32 and normalized from timm's policies.
        """
        rows = torch.from_numpy(indices)
        if augment == "none":
            return self.pixels[rows]
        if augment == "crop":
            return moved(self.pixels[rows], torch.from_numpy(seeds))
        return torch.stack([self._changed(int(i), int(s), augment, erase) for i, s in zip(indices, seeds, strict=True)])

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) as the model takes them; what is float already has been normalized."""
        if images.is_floating_point():
            return images
        mean, std = (value.to(images.device) for value in self.preprocess.statistics())
        return images.float().sub_(255 * mean).div_(255 * std)

    def _changed(self, index: int, seed: int, policy: str, erase: float) -> Tensor:
        from PIL import Image

        name = f"{policy} {erase}"
        if name not in self._transforms:
            self._transforms[name] = timm_transform(policy, erase, self.preprocess)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        return self._transforms[name](Image.fromarray(self.pixels[index].movedim(0, -1).numpy()))


class _Normalized:
    """Without labels, normalized when asked for."""

    def __init__(self, examples: Examples) -> None:
        self.num_images, self._examples = len(examples), examples

    def __iter__(self) -> Iterator[Tensor]:
        return (self._examples.normalize(part) for part in self._examples.pixels.split(BATCH))


def timm_transform(policy: str, erase: float, preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
    """timm's transform for training.

    Raises:
        RecipeError: timm knows no such policy.
    """
    from timm.data import create_transform

    try:
        transform: Any = create_transform(
            preprocess.size,
            is_training=True,
            auto_augment=policy,
            interpolation="random",
            mean=preprocess.mean,
            std=preprocess.std,
            re_prob=erase,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise RecipeError(
            f"augment is {policy!r}; it can be {', '.join(AUGMENTS)} or one of timm's policies, as rand-m9-mstd0.5-inc1"
        ) from error
    for part in transform.transforms:
        for op in (*getattr(part, "ops", ()), *chain(*getattr(part, "policy", ()))):
            if op.name.startswith("Posterize"):
                op.level_fn = partial(_one_bit_or_more, op.level_fn)
    return transform


def _one_bit_or_more(bits: Callable[..., tuple[int]], *level: Any) -> tuple[int]:
    """What is left of each color where timm's strongest posterizing leaves 0 bits, which PIL refuses."""
    return (max(1, *bits(*level)),)


def moved(pixels: Tensor, seeds: Tensor) -> Tensor:
    """Moves each image (B, 3, H, W) by up to an eighth of its sides, black coming in, and mirrors half of them.

    seeds: int64 (B,), at least 0: bits 0 to 19 say how far down, 20 to 39 how far across, 40 whether mirrored.
    """
    h, w = pixels.shape[-2:]
    margins = h // MARGIN, w // MARGIN
    padded = functional.pad(pixels, [margins[1], margins[1], margins[0], margins[0]])
    down, across = ((seeds >> shift) % 2**20 % (2 * m + 1) for shift, m in zip((0, 20), margins, strict=True))
    rows = down[:, None] + torch.arange(h)  # (B, H)
    columns = across[:, None] + torch.arange(w)  # (B, W)
    columns = torch.where(((seeds >> 40) % 2 == 1)[:, None], columns.flip(1), columns)
    flat = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).flatten(1)  # (B, H W)
    return padded.flatten(2).gather(2, flat[:, None].expand(-1, 3, -1)).unflatten(2, (h, w))
