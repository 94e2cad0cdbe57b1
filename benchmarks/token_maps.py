"""Whether patches that are kept lie on what was pasted into an image: `benchmarks/token_studies.py maps`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

import peers
from martlet.cli.terminal import working
from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data import open_images
from martlet.source import load_model
from martlet.techniques.tokens.ia_red2 import IARED2
from martlet.vit.groups import groups

WEIGHTS = "vit_tiny_patch16_224.in1k.safetensors"
PATCH, GRID, OBJECT = 16, 14, 7
"""Pixels of a patch, patches of an image, and of what is pasted, down and across."""
LEARN, TEST = 256, 200
BLUR = 8
WAYS = {"attention": IARED2(steps=0), "learned policies": IARED2()}


@dataclass(frozen=True)
class Pasted:
    """Images (N, 3, H, W): a picture, a quarter as large, in another that is blurred; and where it is, (N, 196)."""

    images: Tensor
    where: Tensor

    @property
    def num_images(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.images.split(32))


def maps(assets: Path, seed: int, known: set[str]) -> Iterator[dict[str, Any]]:
    """How many of the patches that are kept lie on what was pasted, after each reduction."""
    if known >= set(WAYS):
        return
    model = load_model("timm:vit_tiny_patch16_224", weights=assets / "weights" / WEIGHTS)
    learn = pasted(model, peers._images(assets, peers.VALIDATION), LEARN, seed)
    test = pasted(model, peers._images(assets, peers.SAMPLE), TEST, seed)
    for name, technique in WAYS.items():
        if name in known:
            continue
        with working(name) as progress:
            done = pipeline.run(model, Recipe((technique,)), Context(images=learn, seed=seed, progress=progress))
        found = [groups(done, part) for part in test]
        kept = [torch.cat([each[i].of >= 0 for each in found]) for i in range(len(found[0]))]
        yield {
            "name": name,
            "model": model.name,
            "weights": model.origin["weights"],
            "recipe": Recipe((technique,)).to_yaml(),
            "images": f"{LEARN} of {peers.VALIDATION} to learn from, {TEST} of {peers.SAMPLE} to test",
            "n": TEST,
            "kept": [int(its[0].sum()) for its in kept],
            "on_object_pct": [100 * float((its & test.where).sum() / its.sum()) for its in kept],
            "of_all_pct": 100 * OBJECT**2 / GRID**2,
        }


def pasted(model: Model, source: str | Path, n: int, seed: int) -> Pasted:
    """The first n of a drawn order, each pasted into the one after it."""
    rng, size = np.random.default_rng(seed), PATCH * OBJECT
    crops = [model.preprocess.crop(sample.image) for sample in open_images(source, limit=n, seed=seed)]
    images, where = [], torch.zeros(n, GRID, GRID, dtype=torch.bool)
    for i, crop in enumerate(crops):
        down, across = (int(place) for place in rng.integers(GRID - OBJECT + 1, size=2))
        whole = Image.fromarray(crops[(i + 1) % n]).filter(ImageFilter.GaussianBlur(BLUR))
        whole.paste(
            Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC), (PATCH * across, PATCH * down)
        )
        images.append(model.preprocess.normalize(np.asarray(whole)))
        where[i, down : down + OBJECT, across : across + OBJECT] = True
    return Pasted(torch.from_numpy(np.stack(images)), where.flatten(1))
