"""Whether patches that are kept lie on what was pasted into an image: `benchmarks/token_studies.py maps`."""

from __future__ import annotations

from collections.abc import Iterator
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
from token_parts import Some

WEIGHTS = "vit_tiny_patch16_224.in1k.safetensors"
PATCH, GRID, OBJECT = 16, 14, 7
"""Pixels of a patch, patches of an image, and of what is pasted, down and across."""
LEARN, TEST = 256, 200
BLUR = 8
WAYS = {"attention": IARED2(steps=0), "learned policies": IARED2()}


def maps(assets: Path, seed: int, known: set[str]) -> Iterator[dict[str, Any]]:
    """How many of the patches that are kept lie on what was pasted, after each reduction."""
    if known >= set(WAYS):
        return
    model = load_model("timm:vit_tiny_patch16_224", weights=assets / "weights" / WEIGHTS)
    learn, _ = pasted(model, peers._images(assets, peers.VALIDATION), LEARN, seed)
    test, where = pasted(model, peers._images(assets, peers.SAMPLE), TEST, seed)
    for name, technique in WAYS.items():
        if name in known:
            continue
        with working(name) as progress:
            done = pipeline.run(model, Recipe((technique,)), Context(images=Some(learn), seed=seed, progress=progress))
        found = [groups(done, part) for part in torch.from_numpy(test).split(32)]
        kept = [torch.cat([each[i].of >= 0 for each in found]) for i in range(len(found[0]))]
        yield {
            "name": name,
            "model": model.name,
            "weights": model.origin["weights"],
            "recipe": Recipe((technique,)).to_yaml(),
            "images": f"{LEARN} of {peers.VALIDATION} to learn from, {TEST} of {peers.SAMPLE} to test",
            "n": TEST,
            "kept": [int(its[0].sum()) for its in kept],
            "on_object_pct": [100 * float((its & where).sum() / its.sum()) for its in kept],
            "of_all_pct": 100 * OBJECT**2 / GRID**2,
        }


def pasted(model: Model, source: str | Path, n: int, seed: int) -> tuple[np.ndarray, Tensor]:
    """n images of a drawn order, each a quarter as large in the next, blurred, (N, 3, H, W); and where, (N, 196)."""
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
    return np.stack(images), where.flatten(1)
