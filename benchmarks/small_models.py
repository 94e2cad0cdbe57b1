"""Trains the small models that quantizing and pruning are measured on beside ViTs, on CIFAR-10 and Tiny-ImageNet.

    python benchmarks/small_models.py deit hybrid --out DIR             # half an hour to an hour each, one thread each

As `martlet train` does: DIR/NAME is the artifact, with its curves, and a training that was stopped goes on. Besides
writes DIR/NAME.safetensors, and to results/small_models.json how it was trained, its curves, and its top-1 on the test
images. What is in DIR already isn't trained again. `load` gives a trained one to other benchmarks: of that folder, or
of `weights` beside this file, which has some of them, in float16.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
from martlet.cli.terminal import note, working
from martlet.core import report
from martlet.core.errors import MartletError, UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Progress
from martlet.data import open_images
from martlet.measure.macs import macs
from martlet.measure.size import params
from martlet.source import load_model
from martlet.techniques.tune.finetune import Finetune
from martlet.training.job import train as martlet_train
from setups import cifar
from setups.tuning_tasks import WEIGHTS, renewed

if TYPE_CHECKING:
    from martlet.core.model import Model

KEPT = Path(__file__).parent / "weights"
CLASSES = {"cifar10": cifar.CLASSES, "tiny-imagenet-200": 200}
"""By the folder of assets that images are in."""
TITLES = {"cifar10": "CIFAR-10", "tiny-imagenet-200": "Tiny-ImageNet"}


@dataclass(frozen=True, kw_only=True)
class Small:
    """A model cut down to what small images need.

    size: side of the images it takes, in pixels. data: of CLASSES. begins: file of the assets' weights that training
    starts from, with a new classifier; random, where none is named.
    """

    model: str
    size: int
    training: Finetune
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    data: str = "cifar10"
    begins: str = ""

    def begin(self, assets: Path, seed: int = 0) -> Model:
        """The model before it is trained."""
        if not self.begins:
            return self.load("random", seed)
        weights = assets / "weights" / self.begins
        model = load_model(self.model, weights=weights, model_kwargs=self.kwargs, preprocess=self._preprocess())
        return renewed(model, CLASSES[self.data], seed)

    def load(self, weights: str | Path, seed: int = 0) -> Model:
        """The model, random or from a file."""
        return load_model(
            self.model,
            weights=weights,
            num_classes=CLASSES[self.data],
            model_kwargs=self.kwargs,
            preprocess=self._preprocess(),
            seed=seed,
        )

    def _preprocess(self) -> dict[str, Any]:
        """Colors as the weights know them that it begins with."""
        whole = cifar.preprocess(self.size)
        return {key: whole[key] for key in ("size", "resize")} if self.begins else whole


SMALL = {
    "deit": Small(
        model="timm:vit_tiny_patch16_224",
        size=32,
        training=Finetune(epochs=10.0, rate=1e-3),
        kwargs={"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
    ),
    "swin": Small(
        model="timm:swin_tiny_patch4_window7_224",
        size=32,
        training=Finetune(epochs=12.0, rate=1e-3, precision="bf16"),
        kwargs={
            "img_size": 32,
            "patch_size": 4,
            "window_size": 4,
            "embed_dim": 96,
            "depths": [2, 4],
            "num_heads": [3, 6],
            "drop_path_rate": 0.0,
        },
    ),
    "hybrid": Small(model="timm:mobilevit_xxs", size=64, training=Finetune(epochs=5.0, rate=2e-3)),
    "efficientvit": Small(model="timm:efficientvit_b0", size=64, training=Finetune(epochs=5.0, rate=2e-3)),
    "mobilenet": Small(model="timm:mobilenetv2_050", size=64, training=Finetune(epochs=12.0, rate=2e-3)),
    "mamba": Small(
        model="martlet:efficientvmamba_tiny",
        size=32,
        training=Finetune(epochs=3.0, rate=2e-3),
        kwargs={"dim": 32, "depths": [2, 2, 2], "states": 8},
    ),
    "efficientvit_200": Small(
        model="timm:efficientvit_b0", size=64, training=Finetune(epochs=9.0, rate=2e-3), data="tiny-imagenet-200"
    ),
    "vit_tiny_200": Small(
        model="timm:vit_tiny_patch16_224",
        size=64,
        training=Finetune(epochs=1.0, batch=64, rate=2e-4),
        kwargs={"img_size": 64, "patch_size": 8},
        data="tiny-imagenet-200",
        begins=WEIGHTS,
    ),
}


def load(name: str, folder: Path) -> Model:
    """A model that was trained before.

    Raises:
        UsageError: it wasn't.
    """
    file = next((f / f"{name}.safetensors" for f in (folder, KEPT) if (f / f"{name}.safetensors").is_file()), None)
    if file is None:
        raise UsageError(
            f"{folder / name}.safetensors isn't there; "
            f"python benchmarks/small_models.py {name} --out {folder} trains it"
        )
    return SMALL[name].load(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the command line names. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(SMALL), metavar="NAME", help=" or ".join(SMALL))
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--results", type=Path, default=peers.ROOT / "results" / "small_models.json")
    parser.add_argument("--assets", type=Path, default=cifar.ASSETS, help="folder with data")
    options = parser.parse_args(argv)
    try:
        for name in options.names:
            if (options.out / f"{name}.safetensors").is_file():
                note(f"{name} is in {options.out} already")
                continue
            with working(f"train {name}") as progress:
                row = train(name, options.assets, options.out, progress)
            found = options.results
            before = json.loads(found.read_text(encoding="utf-8"))["rows"] if found.is_file() else []
            rows = [*(its for its in before if its["name"] != name), row]
            peers.keep(found, {"benchmark": "small_models", "rows": rows}, peers.PACKAGES)
            note(f"{name}: top-1 {row['top1_pct']:.1f} % in {row['seconds']:.0f} s")
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


def train(name: str, assets: Path, folder: Path, progress: Progress, seed: int = 0) -> dict[str, Any]:
    """Trains one as `martlet train` does, and writes its weights. Returns its row."""
    import torch
    from safetensors.torch import save_file

    small = SMALL[name]
    data = assets / "data" / small.data
    model = small.begin(assets, seed)
    model.module.to(memory_format=torch.channels_last)  # which convolutions on a CPU take faster
    recipe = Recipe((small.training,))
    artifact = martlet_train(
        model, images=open_images(data / "train.parquet"), recipe=recipe, out=folder / name, progress=progress
    )
    trained = artifact.model()
    tested, truth = cifar.read(open_images(data / "test.parquet"), trained)
    found = cifar.logits(trained, tested)
    weights = folder / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in trained.module.state_dict().items()}, f"{weights}.part")
    os.replace(f"{weights}.part", weights)
    (step,) = trained.steps
    return {
        "name": name,
        "model": small.model,
        "kwargs": dict(small.kwargs),
        "size": small.size,
        "data": small.data,
        "begins": small.begins,
        "parameters": params(trained.module),
        "macs": macs(trained),
        "recipe": str(recipe),
        "seed": seed,
        "n_images": len(truth),
        "top1_pct": 100 * float((found.argmax(1) == truth).float().mean()),
        "training": step.record,
        "seconds": step.seconds,
        "environment": report.environment(peers.PACKAGES),
    }


if __name__ == "__main__":
    sys.exit(main())
