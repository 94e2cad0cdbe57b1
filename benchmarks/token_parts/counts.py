"""One LookupViT that runs with several numbers of compressed tokens: what `benchmarks/token_studies.py` trains."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from martlet import engine as engines
from martlet.cli.terminal import working
from martlet.core import pipeline
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data import open_images
from martlet.data.examples import Examples
from martlet.measure.macs import macs
from martlet.source import load_model
from martlet.training.objective import Batch, CrossEntropy, Objective
from martlet.training.technique import Training
from setups import cifar

SIDES = (2, 4, 6)
"""Compressed tokens down and across, of 8 by 8 patches."""
DIMS = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}


class AnySide(CrossEntropy):
    """The labels, by a number of compressed tokens drawn anew in each step.

    Paper: Koner et al., LookupViT, 2024, arXiv 2407.12753, where several numbers share one model.
    """

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        side = int(np.random.default_rng(batch.step).choice(SIDES))
        return self.error(student(batch.images, side), batch)


@dataclass(frozen=True, kw_only=True)
class AnyCount(Training):
    """All weights, so that every number of compressed tokens works."""

    name: ClassVar[str] = "any_count"
    summary: ClassVar[str] = "train with every number of compressed tokens"
    needs_labels: ClassVar[bool] = True

    def objective(self, model: Model, context: Context) -> Objective:
        return AnySide(self.smoothing)


TRAINING = AnyCount(epochs=12.0, rate=1e-3)


def compressed(assets: Path, known: set[str], kept: Kept) -> Iterator[dict[str, Any]]:
    """Top-1 on CIFAR-10 of one trained set of weights with each number, and how far OpenVINO's logits are off.

    MACs are beside those of the ViT of the same width and depth.
    """
    names = {side: f"{side} × {side} compressed tokens" for side in SIDES}
    if known >= set(names.values()):
        return
    options: dict[str, Any] = {"weights": "random", "num_classes": cifar.CLASSES, "preprocess": cifar.preprocess(32)}
    untrained = load_model("martlet:lookup_vit_small_patch16_224", model_kwargs=DIMS, **options)
    macs_float = macs(load_model("timm:vit_tiny_patch16_224", model_kwargs=DIMS, **options))
    train, test = (open_images(assets / "data" / "cifar10" / f"{part}.parquet") for part in ("train", "test"))
    examples = Examples.read(train, untrained.preprocess, untrained.num_classes)
    x, labels = cifar.read(test, untrained)
    with working("lookup_vit") as progress:
        model = pipeline.run(untrained, Recipe((TRAINING,)), Context(training=examples, progress=progress, kept=kept))
    for side, name in names.items():
        if name in known:
            continue
        model.module.compressed = side  # type: ignore[assignment]
        logits = cifar.logits(model, x)
        yield {
            "name": name,
            "model": f"lookup_vit {DIMS}",
            "recipe": Recipe((TRAINING,)).to_yaml(),
            "images": "CIFAR-10, all 50,000 to train on from random weights, all 10,000 to test",
            "n": len(labels),
            "macs": macs(model),
            "macs_float": macs_float,
            "top1_pct": 100 * float((logits.argmax(1) == labels).float().mean()),
            "relative_error": _off(model, x[:64], logits[:64]),
        }


def _off(model: Model, x: Tensor, logits: Tensor) -> float:
    """The largest error of OpenVINO's logits over the largest logit."""
    engine = engines.get("openvino")
    with tempfile.TemporaryDirectory() as folder:
        engine.lower(model, Path(folder))
        found = engine.open(Path(folder), batch=len(x))(x.numpy())
    return float(np.abs(found - logits.numpy()).max() / logits.abs().max())
