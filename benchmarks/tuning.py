"""What ways to tune cost, in training and when deployed; and hints where images are few (results/tuning.json).

    python benchmarks/tuning.py memory              # seconds: what a step keeps, and what a task's file holds
    python benchmarks/tuning.py few_shot            # an hour: 4 and 8 images a class, with and without hints
    python benchmarks/tuning.py times               # minutes, on a quiet machine: steps, and the deployed model

ViT-Ti with ImageNet weights, tuned to CIFAR-10's ten classes. Memory is counted, not sampled: bytes of the tensors
that autograd keeps of one step, of gradients, and of the optimizer's moments. Deployed is OpenVINO, batch 1,
interleaved with the untouched model; merged LoRA is the plain model again. `few_shot` takes ViT-Ti at 64 pixels, and
standard augmentation with and without `hint_aug`, or with one half of it; and as much of it as mixes no images. Parts
and rows that are there already aren't done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peers
import train
from martlet import engine as engines
from martlet.cli.terminal import note, working
from martlet.core import pipeline, registry, store
from martlet.core.errors import MartletError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress
from martlet.data import open_images
from martlet.data.examples import Examples
from martlet.measure import latency
from martlet.measure.size import params
from martlet.training.technique import Training
from martlet.vit.image_size import set_image_size_
from setups.cifar import ASSETS, CLASSES
from setups.tuning_tasks import WEIGHTS, base, few

if TYPE_CHECKING:
    import torch

WAYS = ("finetune", "probe", "bitfit", "lora", "lora_ga", "adapter", "vpt", "ladder", "sherl", "pyra")
BEFORE = {"pyra": Recipe.load("tome")}
"""What comes before a way."""
CUTTING = {"light_peft": "lora"}
"""Ways whose model is smaller after the first steps, and what later ones are as; timed beside the others."""
BATCH, SEEDS, NUM_TEST = 16, (0, 1, 2), 1000
PACKAGES = ("torch", "timm", "peft", "openvino", "numpy")
FEW_SHOT_SIZE = 64
FEW_SHOT_EPOCHS = {4: 15.0, 8: 7.5}
"""By images a class; 30 steps of 20 images each."""
FEW_SHOT_WAYS = ("lora", "adapter", "vpt")
PLAIN = "batch: 20, rate: 0.005, augment: rand-m9-mstd0.5-inc1"
STANDARD = f"{PLAIN}, mixup: 0.5, cutmix: 1.0"
HINTS = {
    "standard": ("", STANDARD),
    "hint_aug": ("hint_aug, ", STANDARD),
    "no detector": ("hint_aug: {detector: false}, ", STANDARD),
    "no infusion": ("hint_aug: {infusion: false}, ", STANDARD),
    "unmixed": ("", PLAIN),
}
"""By name, what comes before a way, and how the way is tuned: as the official code of `hint_aug` augments, or less."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the parts that the command line names. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PART, metavar="PART", help=", ".join(PART))
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results" / "tuning.json")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with data/cifar10 and weights")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="NAME")
    options = parser.parse_args(argv)
    document = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    document |= {
        "benchmark": "tuning",
        "settings": {"batch": BATCH, "weights": WEIGHTS},
    }
    try:
        for part in options.parts:
            with working(part) as progress:
                for row in PART[part](options.assets, options.ways, document.setdefault(part, []), progress):
                    document[part] = [*(r for r in document[part] if _key(r) != _key(row)), row]
                    peers.keep(options.out, document, PACKAGES)
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


def way(name: str) -> Training:
    """A technique with the benchmark's batch."""
    found = registry.technique(name)()
    assert isinstance(found, Training)
    return replace(found, batch=BATCH)


def prepared(name: str, model: Model) -> Model:
    """With what has to come before a way."""
    return pipeline.run(model, BEFORE[name], Context()) if name in BEFORE else model


def gray(model: Model) -> Examples:
    """A batch of images, where what they show doesn't matter."""
    import torch

    pixels = torch.full((BATCH, 3, *model.preprocess.size), 128, dtype=torch.uint8)
    return Examples(pixels, torch.arange(BATCH) % CLASSES, model.preprocess, "gray")


Rows = Callable[[Path, Sequence[str], Sequence[Mapping[str, Any]], Progress], Any]


def memory(assets: Path, ways: Sequence[str], rows: Sequence[Mapping[str, Any]], progress: Progress) -> Any:
    """Bytes that a step keeps, in all and by what; and bytes of a task's file beside the model's."""
    for i, name in enumerate(ways):
        progress(f"count {name}", i, len(ways))
        if any(row["way"] == name for row in rows):
            continue
        model = prepared(name, base(assets))
        technique = way(name)
        step = Step(model, technique, gray(model))
        kept = step.kept_bytes()
        optimizer = step.optimizer
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        moments = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
        yield {
            "way": name,
            "learned": sum(p.numel() for p in learned),
            "parameters": params(model.module),
            "activation_bytes": kept,
            "gradient_bytes": sum(p.nbytes for p in learned),
            "moment_bytes": moments,
            "file_bytes": sum(p.nbytes for p in learned),
        }


class Step:
    """One step of the loop's, apart from it, so that it can be timed and its tensors counted."""

    def __init__(self, model: Model, technique: Training, examples: Examples) -> None:
        from martlet.techniques.tune.pyra import Pyra
        from martlet.training.inserted import Inserted
        from martlet.training.objective import RATE, Batch

        self.model = model
        if isinstance(technique, Inserted | Pyra):
            technique._put_in_(model)
        self.objective = technique.objective(model, Context(training=examples))
        self.objective.prepare_(model.module)
        groups = self.objective.groups(model.module, technique.weight_decay)
        model.module.requires_grad_(False)
        for group in groups:
            group["lr"] = technique.rate * group.pop(RATE, 1.0)
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        self.optimizer = technique.optimizer(groups)
        rows = np.arange(len(examples))[: technique.batch]
        assert examples.labels is not None
        self.batch = Batch(
            images=examples.normalize(examples.pixels[rows]),
            labels=examples.labels[rows],
            indices=rows,
            seeds=rows,
            step=0,
            steps=1,
        )
        model.module.train()

    def __call__(self) -> None:
        self.objective.loss(self.model.module, self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def kept_bytes(self) -> int:
        """Of the tensors that autograd keeps for the backward pass, but for parameters, each storage once."""
        import torch

        own = {p.untyped_storage().data_ptr() for p in self.model.module.parameters()}
        kept: dict[int, int] = {}
        held = []  # so that no address is given twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
                held.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.objective.loss(self.model.module, self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(kept.values())


def few_shot(assets: Path, ways: Sequence[str], rows: Sequence[Mapping[str, Any]], progress: Progress) -> Any:
    """Top-1 from few images a class, after each way with each of HINTS, for each seed of images, classifier and order.

    Standard augmentation with hints and without comes first, then what takes the two apart.
    """
    done, test = {_key(row) for row in rows}, None
    for hints in (("standard", "hint_aug"), ("unmixed", "no detector", "no infusion")):
        for shots, seed in product(FEW_SHOT_EPOCHS, SEEDS):
            recipes = {
                f"[{HINTS[name][0]}{its}: {{epochs: {FEW_SHOT_EPOCHS[shots]}, {HINTS[name][1]}}}]": (name, its)
                for name, its in product(hints, FEW_SHOT_WAYS)
                if its in ways
            }
            missing = [recipe for recipe in recipes if (recipe, seed, shots) not in done]
            if not missing:
                continue
            model = base(assets, seed)
            set_image_size_(model, (FEW_SHOT_SIZE, FEW_SHOT_SIZE))
            images = few(assets, model, shots, seed)
            if test is None:
                pool = open_images(assets / "data" / "cifar10" / "test.parquet", limit=NUM_TEST, seed=0)
                test = Examples.read(pool, model.preprocess, CLASSES, progress)
            for recipe in missing:
                name, its = recipes[recipe]
                start = time.perf_counter()
                passes = Recipe.from_yaml(f"martlet: 1\npasses: {recipe}")
                tuned = pipeline.run(model, passes, Context(training=images, seed=seed, progress=progress))
                row = {
                    "way": recipe,
                    "tuned_by": its,
                    "hints": name,
                    "shots": shots,
                    "seed": seed,
                    "top1_pct": train.top1(tuned, test),
                    "n": len(test),
                    "size_px": FEW_SHOT_SIZE,
                    "steps": tuned.steps[-1].record["steps"],
                    "seconds": time.perf_counter() - start,
                }
                note(f"{recipe}, {shots} images a class, seed {seed}: {row['top1_pct']:.1f} %")
                yield row


def times(assets: Path, ways: Sequence[str], rows: Sequence[Mapping[str, Any]], progress: Progress) -> Any:
    """Milliseconds of a step and of a deployed inference, each interleaved with all others; ratios to the first."""
    steps: dict[str, Callable[[], object]] = {}
    models: dict[str, Model] = {"untouched": base(assets)}
    ways = [*ways, *CUTTING]
    for name in ways:
        model = prepared(name, base(assets))
        quick = replace(way(name), epochs=20.0 if name in CUTTING else 1.0, augment="none")
        models[name] = pipeline.run(model, Recipe((quick,)), Context(training=gray(model)))
        its = models[name].copy() if name in CUTTING else model
        steps[name] = Step(its, way(CUTTING.get(name, name)), gray(its))
    trained = latency.interleave(steps, max_rounds=20, max_seconds=300.0, progress=progress)
    target = engines.get("openvino")
    with tempfile.TemporaryDirectory() as root:
        runs: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            folder = Path(root) / name
            with store.writing(folder) as writes:
                store.seal(writes, model, target.name, store.write_model(writes, model, target))
            session = store.load(folder).open()
            images = np.zeros((1, 3, *model.preprocess.size), dtype=np.float32)
            runs[name] = lambda session=session, images=images: session(images)
        deployed = latency.interleave(runs, min_seconds=30.0, progress=progress)
    for name in ways:
        yield {
            "way": name,
            "step_ms": latency.summary(trained[name]),
            "step_speedup": latency.ratio(trained[ways[0]], trained[name]),
            "latency_ms": latency.summary(deployed[name]),
            "speedup": latency.ratio(deployed["untouched"], deployed[name]),
        }


PART: dict[str, Rows] = {"memory": memory, "few_shot": few_shot, "times": times}


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["way"], row.get("seed", 0), row.get("shots", 0)


if __name__ == "__main__":
    sys.exit(main())
