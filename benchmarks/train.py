"""What training gives back of what compression cost, on a small ViT and CIFAR-10; and how long the loop's steps take.

    python benchmarks/train.py        # some minutes a row on two cores, to results/train.json
    python benchmarks/train.py steps  # a minute on a quiet machine: steps of the loop, and as timm's script takes them

Each row is a recipe without and with a pass that trains, on the same 2,000 test images. Rows that are there already
aren't done again, and a row that was stopped goes on. `steps` times the loop and the steps of timm's script (its
loader, optimizer, loss, clipping and schedule, in this process) in turns, on the same model and images.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peers
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
from martlet.measure import latency
from martlet.source import load_model
from martlet.techniques.tune.finetune import Finetune
from setups.cifar import ASSETS, CLASSES, MEAN, STD, preprocess

WEIGHTS = "vit_d128x4.cifar10.safetensors"
KWARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
NUM_TEST = 2000
NUM_TRAIN = 10_000
QUANTIZE = "uniform: {{weight_bits: {bits}, activation_bits: 8, ranges: {ranges}}}"
TRAIN = "epochs: 1.0, batch: 64, rate: 0.0005"
ROWS = (
    *(f"[{QUANTIZE.format(bits=b, ranges=r)}, lsq: {{{TRAIN}}}]" for b, r in ((3, "mse"), (2, "mse"), (3, "minmax"))),
    f"[ziplm: {{prune_ratio: 0.4}}, distill: {{{TRAIN}}}]",
    f"[magnitude: {{prune_ratio: 0.4}}, distill: {{{TRAIN}}}]",
)
"""What costs accuracy, and then what trains."""
STEPS, BATCH = 20, 64
"""That are timed at once, and images in each."""
PACKAGES = ("torch", "timm", "accelerate", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Fills in the rows that are missing. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("rows", "steps"), default="rows", help="what to measure")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results" / "train.json")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with data/cifar10 and weights")
    options = parser.parse_args(argv)
    try:
        document = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {"rows": []}
        rows = document["rows"]
        document |= {"benchmark": "train", "created": datetime.now(UTC).isoformat(timespec="seconds")}
        if options.part == "steps":
            with working("time steps") as progress:
                document["steps"] = steps(options.assets, progress)
            peers.write(options.out, document)
            note(f"a step of timm's is {document['steps']['speedup']['median']:.3f} of one of the loop's")
            return 0
        for recipe in ROWS:
            if any(row["recipe"] == recipe for row in rows):
                continue
            with working(recipe) as progress:
                rows.append(measure(recipe, options.assets, options.out, progress))
            peers.write(options.out, document)
            note(f"{recipe}: {rows[-1]['top1_pct']}, {rows[-1]['recovered_pct']:.0f} % of the loss")
    except MartletError as error:
        note(str(error))
        return error.exit_status
    shutil.rmtree(Kept.beside(options.out).folder, ignore_errors=True)
    return 0


def measure(recipe: str, assets: Path, out: Path, progress: Progress, seed: int = 0) -> dict[str, Any]:
    """One row."""
    whole = Recipe.from_yaml(f"martlet: 1\npasses: {recipe}")
    source = small(assets)
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
    smaller = pipeline.run(source, Recipe(whole.passes[:1]), context)
    trained = pipeline.run(smaller, Recipe(whole.passes[1:]), context)
    top1_pct = {
        name: top1(model, test) for name, model in (("whole", source), ("smaller", smaller), ("trained", trained))
    }
    return {
        "recipe": recipe,
        "model": f"timm:vit_tiny_patch16_224 {KWARGS}",
        "weights": source.origin["weights"],
        "seed": seed,
        "n_images": len(test),
        "simulated": trained.simulated,
        "top1_pct": top1_pct,
        "recovered_pct": 100 * (top1_pct["trained"] - top1_pct["smaller"]) / (top1_pct["whole"] - top1_pct["smaller"]),
        "training": trained.steps[-1].record,
        "seconds": time.perf_counter() - start,
        "environment": report.environment(PACKAGES),
    }


def small(assets: Path | None, seed: int = 0) -> Model:
    """The trained ViT of width 128; without assets, with random weights."""
    return load_model(
        "timm:vit_tiny_patch16_224",
        weights=assets and assets / "weights" / WEIGHTS,
        seed=seed,
        model_kwargs=KWARGS,
        num_classes=CLASSES,
        preprocess=preprocess(32),
    )


def steps(assets: Path, progress: Progress) -> dict[str, Any]:
    """STEPS steps of the loop, and as timm's training script takes them, in turns; milliseconds a step."""
    model = small(assets)
    pool = open_images(assets / "data" / "cifar10" / "train.parquet", limit=STEPS * BATCH, seed=0)
    examples = Examples.read(pool, model.preprocess, CLASSES, progress)
    technique = Finetune(epochs=1.0, batch=BATCH)
    runs = {
        "timm": lambda: timm_steps(model, examples),
        "martlet": lambda: pipeline.run(model, Recipe((technique,)), Context(training=examples)),
    }
    found = latency.interleave(runs, min_seconds=60.0, max_rounds=15, progress=progress)
    its = {name: milliseconds / STEPS for name, milliseconds in found.items()}
    return {
        "model": f"timm:vit_tiny_patch16_224 {KWARGS}",
        "batch": BATCH,
        "steps": STEPS,
        "step_ms": {name: latency.summary(values) for name, values in its.items()},
        "speedup": latency.ratio(its["timm"], its["martlet"]),
        "environment": report.environment(PACKAGES),
    }


def timm_steps(model: Model, examples: Examples) -> None:
    """STEPS steps as the training script of timm's repository takes them, without its log."""
    import torch
    from PIL import Image
    from timm.data.loader import create_loader
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    assert examples.labels is not None
    labels = examples.labels.tolist()

    class Pictures(torch.utils.data.Dataset):
        transform: Any = None

        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, i: int) -> Any:
            return self.transform(Image.fromarray(examples.pixels[i].movedim(0, -1).numpy())), labels[i]

    module = model.copy().module.train()
    loader = create_loader(
        Pictures(),
        (3, 32, 32),
        BATCH,
        is_training=True,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        mean=MEAN,
        std=STD,
        device=torch.device("cpu"),
    )
    optimizer = create_optimizer_v2(module, opt="adamw", lr=5e-4, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=STEPS, t_in_epochs=False)
    error = LabelSmoothingCrossEntropy(0.1)
    for step, (images, truth) in enumerate(loader):
        loss = error(module(images), truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step_update(step + 1)


def top1(model: Model, test: Examples) -> float:
    """Per cent of images whose label is the model's first answer, in PyTorch."""
    import torch

    assert test.labels is not None
    with torch.inference_mode():
        logits = torch.cat([model.module(test.normalize(part)) for part in test.pixels.split(250)])
    return 100 * float((logits.argmax(1) == test.labels).float().mean())


if __name__ == "__main__":
    sys.exit(main())
