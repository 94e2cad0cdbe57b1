"""What training gives back of what few bits cost, on a small ViT and CIFAR-10.

    python benchmarks/train.py        # some minutes a row on two cores, to results/train.json

Each row is a recipe without and with a pass that trains, on the same 2,000 test images. Rows that are there already
aren't done again, and a row that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
from cifar import ASSETS, CLASSES, MEAN, STD
from martlet.cli.terminal import note, working
from martlet.core import pipeline, report
from martlet.core.errors import MartletError
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress
from martlet.data import open_images
from martlet.data.calibration import Calibration
from martlet.data.examples import Examples
from martlet.source import load_model

WEIGHTS = "vit_d128x4.cifar10.safetensors"
KWARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
NUM_TEST = 2000
NUM_TRAIN = 10_000
QUANTIZE = "uniform: {{weight_bits: {bits}, activation_bits: 8, ranges: {ranges}}}"
TRAIN = "lsq: {epochs: 1.0, batch: 64, rate: 0.0005}"
ROWS = [(3, "mse"), (2, "mse"), (3, "minmax")]
PACKAGES = ("torch", "timm", "accelerate", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Fills in the rows that are missing. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results" / "train.json")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with data/cifar10 and weights")
    options = parser.parse_args(argv)
    try:
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.out.is_file() else []
        for bits, ranges in ROWS:
            recipe = f"[{QUANTIZE.format(bits=bits, ranges=ranges)}, {TRAIN}]"
            if any(row["recipe"] == recipe for row in rows):
                continue
            with working(recipe) as progress:
                rows.append(measure(recipe, options.assets, options.out, progress))
            peers.write(options.out, {"about": __doc__, "rows": rows})
            note(f"{recipe}: {rows[-1]['top1_pct']}, {rows[-1]['recovered_pct']:.0f} % of the loss")
    except MartletError as error:
        note(str(error))
        return error.exit_status
    shutil.rmtree(Kept.beside(options.out).folder, ignore_errors=True)
    return 0


def measure(recipe: str, assets: Path, out: Path, progress: Progress, seed: int = 0) -> dict[str, Any]:
    """One row."""
    whole = Recipe.from_yaml(f"martlet: 1\npasses: {recipe}")
    source = load_model(
        "timm:vit_tiny_patch16_224",
        weights=assets / "weights" / WEIGHTS,
        model_kwargs=KWARGS,
        num_classes=CLASSES,
        preprocess={"size": (32, 32), "resize": 32, "mean": MEAN, "std": STD},
    )
    pool = open_images(assets / "data" / "cifar10" / "train.parquet", limit=NUM_TRAIN, seed=seed)
    test = Examples.read(
        open_images(assets / "data" / "cifar10" / "test.parquet", limit=NUM_TEST, seed=seed),
        source.preprocess,
        CLASSES,
        progress,
    )
    context = Context(
        images=Calibration(pool, source.preprocess, n=64, seed=seed),
        training=Examples.read(pool, source.preprocess, CLASSES, progress),
        teacher=source,
        seed=seed,
        progress=progress,
        kept=Kept.beside(out),
    )
    start = time.perf_counter()
    rounded = pipeline.run(source, Recipe(whole.passes[:1]), context)
    trained = pipeline.run(rounded, Recipe(whole.passes[1:]), context)
    top1_pct = {
        name: top1(model, test) for name, model in (("float", source), ("rounded", rounded), ("trained", trained))
    }
    return {
        "recipe": recipe,
        "model": f"timm:vit_tiny_patch16_224 {KWARGS}",
        "weights": source.origin["weights"],
        "seed": seed,
        "n_images": len(test),
        "simulated": trained.simulated,
        "top1_pct": top1_pct,
        "recovered_pct": 100 * (top1_pct["trained"] - top1_pct["rounded"]) / (top1_pct["float"] - top1_pct["rounded"]),
        "training": trained.steps[-1].record,
        "seconds": time.perf_counter() - start,
        "environment": report.environment(PACKAGES),
    }


def top1(model: Model, test: Examples) -> float:
    """Per cent of images whose label is the model's first answer, in PyTorch."""
    import torch

    assert test.labels is not None
    with torch.inference_mode():
        logits = torch.cat([model.module(test.normalize(part)) for part in test.pixels.split(250)])
    return 100 * float((logits.argmax(1) == test.labels).float().mean())


if __name__ == "__main__":
    sys.exit(main())
