"""What ways to tune are measured on: ViT-Ti, and few images of CIFAR-10."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from martlet.core.model import Model
from martlet.data import open_images
from martlet.data.examples import Examples
from martlet.source import load_model
from setups.cifar import CLASSES

WEIGHTS = "vit_tiny_patch16_224.in1k.safetensors"


def vit_tiny(assets: Path) -> Model:
    """ViT-Ti with its ImageNet weights."""
    return load_model("timm:vit_tiny_patch16_224", weights=assets / "weights" / WEIGHTS)


def base(assets: Path, seed: int = 0) -> Model:
    """ViT-Ti, its classifier new: ten classes, drawn by the seed."""
    return renewed(vit_tiny(assets), CLASSES, seed)


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
    import torch

    pool = open_images(assets / "data" / "cifar10" / "train.parquet", limit=100 * CLASSES, seed=seed)
    whole = Examples.read(pool, model.preprocess, CLASSES)
    assert whole.labels is not None
    rows = [np.flatnonzero(whole.labels.numpy() == k)[:shots] for k in range(CLASSES)]
    chosen = np.sort(np.concatenate(rows))
    return whole.take(torch.from_numpy(chosen))
