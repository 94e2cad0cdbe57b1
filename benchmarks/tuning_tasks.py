"""Models and images that ways to tune are measured on: ViT-Ti and few images of CIFAR-10, or a small ViT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import train
from cifar import CLASSES
from martlet.core.model import Model
from martlet.core.technique import Progress
from martlet.data import open_images
from martlet.data.examples import Examples
from martlet.source import load_model

WEIGHTS = "vit_tiny_patch16_224.in1k.safetensors"
NUM_TRAIN = 1000
TRANSFER_CLASSES = 20


def base(assets: Path, seed: int = 0) -> Model:
    """ViT-Ti, its classifier new: ten classes, drawn by the seed."""
    model = load_model("timm:vit_tiny_patch16_224", weights=assets / "weights" / WEIGHTS, num_classes=1000)
    return renewed(model, CLASSES, seed)


def renewed(model: Model, classes: int, seed: int) -> Model:
    """With a new classifier, drawn by the seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(model.module.head.in_features, classes)  # type: ignore[union-attr, arg-type]
    torch.nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
    torch.nn.init.zeros_(head.bias)
    model.module.reset_classifier(classes)  # type: ignore[operator]
    model.module.head = head
    return replace(model, num_classes=classes, class_names=None, origin={**model.origin, "num_classes": classes})


def few(assets: Path, model: Model, shots: int, seed: int) -> Examples:
    """So many images of each class, drawn by the seed."""
    pool = open_images(assets / "data" / "cifar10" / "train.parquet", limit=100 * CLASSES, seed=seed)
    whole = Examples.read(pool, model.preprocess, CLASSES)
    assert whole.labels is not None
    rows = [np.flatnonzero(whole.labels.numpy() == k)[:shots] for k in range(CLASSES)]
    chosen = np.sort(np.concatenate(rows))
    return Examples(whole.pixels[chosen], whole.labels[chosen], whole.preprocess, pool.source)


def merged(assets: Path, seed: int, progress: Progress) -> tuple[Model, Examples, Examples]:
    """The small ViT as it is, images of CIFAR-10 to learn from, and others to test on."""
    model, folder = train.small(assets), assets / "data" / "cifar10"
    images, test = (
        Examples.read(open_images(folder / f"{part}.parquet", limit=n, seed=s), model.preprocess, CLASSES, progress)
        for part, n, s in (("train", NUM_TRAIN, seed), ("test", train.NUM_TEST, 0))
    )
    return model, images, test


def transfer(assets: Path, seed: int, progress: Progress) -> tuple[Model, Examples, Examples]:
    """The small ViT with a new classifier of the first classes of Tiny-ImageNet, and images of these."""
    model, folder = renewed(train.small(assets), TRANSFER_CLASSES, seed), assets / "data" / "tiny-imagenet-200"
    found = []
    for part, s in (("train", seed), ("test", 0)):
        pool = open_images(folder / f"{part}.parquet", limit=5 * NUM_TRAIN, seed=s)
        whole = Examples.read(pool, model.preprocess, 200, progress)
        assert whole.labels is not None
        rows = whole.labels < TRANSFER_CLASSES
        found.append(Examples(whole.pixels[rows], whole.labels[rows], whole.preprocess, pool.source))
    return model, found[0], found[1]


TASKS = {"merged": merged, "transfer": transfer}
"""By what a small ViT learns."""
