"""CIFAR-10 as benchmarks read it, and what a model says of many images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peers

if TYPE_CHECKING:
    from torch import Tensor

    from martlet.core.model import Model
    from martlet.data.images import Images

ASSETS = Path(os.environ.get("MARTLET_ASSETS", peers.ROOT.parent / "shared"))
CLASSES = 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def preprocess(side: int) -> dict[str, Any]:
    """For a model that takes so many pixels down and across."""
    return {"size": (side, side), "resize": side, "mean": MEAN, "std": STD}


def read(images: Images, model: Model) -> tuple[Tensor, Tensor]:
    """All images, as the model takes them, (N, 3, S, S), and labels (N,)."""
    import torch

    samples = [(model.preprocess(sample.image), sample.label) for sample in images]
    return torch.from_numpy(np.stack([x for x, _ in samples])), torch.tensor([label for _, label in samples])


def logits(model: Model, x: Tensor) -> Tensor:
    """(N, K) of images (N, 3, S, S), some at a time."""
    import torch

    with torch.inference_mode():
        return torch.cat([model.module(part) for part in x.split(250)])
