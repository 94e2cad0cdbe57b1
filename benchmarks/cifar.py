"""Trains the small models that quantizing is measured on beside ViTs, on CIFAR-10: a Swin, a hybrid, a Mamba.

    python benchmarks/cifar.py swin hybrid mamba --out DIR        # an hour on two cores

Writes DIR/NAME.safetensors and DIR/NAME.json, which says how it was trained and its top-1 on the test images. What is
there already isn't trained again. `load` gives a trained one to other benchmarks: of that folder, or of `weights`
beside this file, which has the Swin, in float16.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peers
from martlet.cli.terminal import note, working
from martlet.core import report
from martlet.core.errors import MartletError, UsageError
from martlet.core.technique import Progress
from martlet.data import open_images
from martlet.source import load_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from martlet.core.model import Model
    from martlet.data.images import Images

ASSETS = Path(os.environ.get("MARTLET_ASSETS", peers.ROOT.parent / "shared"))
KEPT = Path(__file__).parent / "weights"
CLASSES = 10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True, kw_only=True)
class Small:
    """A model cut down to what CIFAR-10 needs. size: side of the images it takes, in pixels."""

    model: str
    size: int
    epochs: int
    rate: float
    bfloat16: bool
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def load(self, weights: str | Path, seed: int = 0) -> Model:
        """The model, random or from a file."""
        preprocess = {"size": (self.size, self.size), "resize": self.size, "mean": MEAN, "std": STD}
        return load_model(
            self.model,
            weights=weights,
            num_classes=CLASSES,
            model_kwargs=self.kwargs,
            preprocess=preprocess,
            seed=seed,
        )


SMALL = {
    "swin": Small(
        model="timm:swin_tiny_patch4_window7_224",
        size=32,
        epochs=12,
        rate=1e-3,
        bfloat16=True,
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
    "hybrid": Small(model="timm:mobilevit_xxs", size=64, epochs=5, rate=2e-3, bfloat16=False),
    "mamba": Small(
        model="martlet:efficientvmamba_tiny",
        size=32,
        epochs=6,
        rate=2e-3,
        bfloat16=False,
        kwargs={"dim": 32, "depths": [2, 2, 2], "states": 8},
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
            f"{folder / name}.safetensors isn't there; python benchmarks/cifar.py {name} --out {folder} trains it"
        )
    return SMALL[name].load(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the command line names. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(SMALL), metavar="NAME", help=" or ".join(SMALL))
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with data/cifar10")
    options = parser.parse_args(argv)
    try:
        for name in options.names:
            if (options.out / f"{name}.json").is_file():
                note(f"{name} is in {options.out} already")
                continue
            with working(f"train {name}") as progress:
                record = train(name, options.assets, options.out, progress)
            note(f"{name}: top-1 {record['top1']:.1f} % in {record['seconds']:.0f} s")
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


def train(name: str, assets: Path, folder: Path, progress: Progress, seed: int = 0) -> dict[str, Any]:
    """Trains one and writes it. Returns its record."""
    import torch
    from safetensors.torch import save_file

    small, start = SMALL[name], time.perf_counter()
    model = small.load("random", seed)
    module = model.module.to(memory_format=torch.channels_last)
    progress("read images", 0, 1)
    images, labels = read(open_images(assets / "data" / "cifar10" / "train.parquet"), model)
    batch, count = 128, len(images)
    steps = count // batch
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), small.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, small.rate, total_steps=small.epochs * steps)
    module.train()
    for epoch in range(small.epochs):
        order = torch.randperm(count)
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            x = _augment(images[chosen]).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=small.bfloat16):
                logits = module(x)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress(f"train {name}, loss {loss.item():.2f}", epoch * steps + step + 1, small.epochs * steps)
    module.eval()
    tested, truth = read(open_images(assets / "data" / "cifar10" / "test.parquet"), model)
    with torch.inference_mode():
        right = sum(
            int((module(x).argmax(1) == y).sum()) for x, y in zip(tested.split(250), truth.split(250), strict=True)
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, f"{weights}.part")
    os.replace(f"{weights}.part", weights)
    record = {
        "model": small.model,
        "kwargs": dict(small.kwargs),
        "size": small.size,
        "data": "CIFAR-10, 50,000 images to train, 10,000 to test",
        "epochs": small.epochs,
        "batch": batch,
        "rate": small.rate,
        "seed": seed,
        "top1": 100 * right / len(truth),
        "seconds": time.perf_counter() - start,
        "environment": report.environment(peers.PACKAGES),
    }
    peers.write(folder / f"{name}.json", record)
    return record


def read(images: Images, model: Model) -> tuple[Tensor, Tensor]:
    """All images, as the model takes them, (N, 3, S, S), and labels (N,)."""
    import torch

    samples = [(model.preprocess(sample.image), sample.label) for sample in images]
    return torch.from_numpy(np.stack([x for x, _ in samples])), torch.tensor([label for _, label in samples])


def _augment(x: torch.Tensor) -> torch.Tensor:
    """Moves each image by up to an eighth and flips half of them."""
    import torch

    side = x.shape[-1]
    margin = side // 8
    padded = torch.nn.functional.pad(x, [margin] * 4)
    top, left = torch.randint(0, 2 * margin + 1, (2, len(x)))
    rows = top[:, None] + torch.arange(side)
    columns = left[:, None] + torch.arange(side)
    columns = torch.where((torch.rand(len(x)) < 0.5)[:, None], columns.flip(1), columns)
    flat = (rows[:, :, None] * (side + 2 * margin) + columns[:, None, :]).flatten(1)  # (B, S S)
    return padded.flatten(2).gather(2, flat[:, None].expand(-1, 3, -1)).unflatten(2, (side, side))


if __name__ == "__main__":
    sys.exit(main())
