"""Where a small image is that moves before another: frames, two networks, and what switching between them saves.

A picture of CIFAR-10, SIDE pixels wide, moves over a dimmed one of CANVAS pixels, sometimes slowly and sometimes fast,
and what moves fast is blurred along its way. The networks give where its middle is. `benchmarks/exits.py` fills in the
rows; the frames are of images that the networks weren't trained on.
"""

from __future__ import annotations

import functools
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet import engine as engines
from martlet.core import report
from martlet.core.model import Model
from martlet.core.technique import Progress
from martlet.data import open_images
from martlet.data.preprocess import Preprocess
from martlet.engine.base import Session
from martlet.engine.stream import Stream
from martlet.functional import switching
from martlet.measure import latency
from martlet.measure.macs import macs
from setups.cifar import MEAN, STD

CANVAS, SIDE, DIM, BLUR = 32, 12, 0.4, 5
"""Pixels, pixels, the share of the background's contrast that is left, and how many places a frame is the mean of."""
SLOW, FAST = (0.0, 1.0), (3.0, 6.0)
"""Pixels a frame."""
SEGMENT = (8, 24)
"""Frames at one speed."""
SHARPS = 0.65
"""Of the segments, those that are slow."""
WIDTHS = {"small": (8, 16, 16, 16), "big": (16, 32, 32, 32, 32)}
"""Channels of convolutions, of which the first two halve the sides."""
STEADY = {"small": 1.0, "big": 0.5}
"""Of the frames that a network is trained on, the share of slow ones: each for what it is there for."""
STEPS, BATCH, RATE = 6000, 64, 3e-3
NUM_TRAIN, NUM_CALIB, NUM_TEST, FRAMES = 4000, 40, 120, 100
"""Pictures to train on; streams to find the threshold on, streams to test on, and frames of each."""
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Mean budgets, of what the big network costs."""
RANDOM, TIMED = 20, 200
"""Draws of switching at random, and frames that are timed."""


class Frames(NamedTuple):
    """images: float32 (T, 3, H, W), normalized. where: (T, 2), pixels from the middle. starts: (T,), of streams."""

    images: Tensor
    where: Tensor
    starts: np.ndarray


def pictures(path: Path, count: int) -> Tensor:
    """float32 (N, 3, 32, 32), normalized."""
    preprocess = Preprocess(size=(32, 32), resize=32, mean=MEAN, std=STD)
    crops = [crop for _, crop in open_images(path, limit=count, seed=0).map(preprocess.crop)]
    return torch.from_numpy(preprocess.normalize(np.stack(crops)))


def render(things: Tensor, grounds: Tensor, where: Tensor, velocity: Tensor) -> Tensor:
    """Frames (B, 3, CANVAS, CANVAS) of things and grounds (B, 3, 32, 32), where and velocity (B, 2) in pixels."""
    back = DIM * functional.interpolate(grounds, (CANVAS, CANVAS), mode="bilinear")
    total = torch.zeros_like(back)
    for i in range(BLUR):
        at = where + velocity * (i / (BLUR - 1) - 0.5)
        scale = CANVAS / SIDE
        theta = scale * torch.eye(2, 3).repeat(len(at), 1, 1)
        theta[:, :, 2] = -2 * at / SIDE
        grid = functional.affine_grid(theta, [len(at), 4, CANVAS, CANVAS], align_corners=False)
        opaque = torch.cat([things, torch.ones_like(things[:, :1])], 1)
        drawn = functional.grid_sample(opaque, grid, align_corners=False)  # (B, 4, H, W), nothing outside
        total += drawn[:, :3] + (1 - drawn[:, 3:]) * back
    return total / BLUR


def streams(images: Tensor, count: int, seed: int) -> Frames:
    """So many streams, of FRAMES frames each."""
    rng, most = np.random.default_rng(seed), (CANVAS - SIDE) / 2
    where, velocity = np.empty((2, count * FRAMES, 2), np.float32)
    pairs = rng.integers(len(images), size=(count, 2))
    for s in range(count):
        at, left, v = rng.uniform(-most, most, 2), 0, np.zeros(2)
        for t in range(s * FRAMES, (s + 1) * FRAMES):
            if not left:
                left, angle = int(rng.integers(*SEGMENT)), rng.uniform(0, 2 * np.pi)
                speed = rng.uniform(*(SLOW if rng.random() < SHARPS else FAST))
                v = speed * np.array([np.cos(angle), np.sin(angle)])
            v = np.where(np.abs(at + v) > most, -v, v)
            at, left = at + v, left - 1
            where[t], velocity[t] = at, v
    which = torch.from_numpy(np.repeat(pairs, FRAMES, 0))
    parts = [
        render(images[rows[:, 0]], images[rows[:, 1]], torch.from_numpy(w), torch.from_numpy(v))
        for rows, w, v in zip(
            which.split(256), np.array_split(where, range(256, len(where), 256)),
            np.array_split(velocity, range(256, len(where), 256)), strict=True
        )
    ]  # fmt: skip
    starts = np.arange(count * FRAMES) % FRAMES == 0
    return Frames(torch.cat(parts), torch.from_numpy(where), starts)


class Network(nn.Module):
    """From frames (B, 3, CANVAS, CANVAS) to places (B, 2), in pixels: where a map of 8 × 8 cells is highest, softly."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(pairwise((3, *widths))):
            layers += [
                nn.Conv2d(before, width, 3, stride=2 if i < 2 else 1, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1), nn.Flatten())
        side = CANVAS // 4
        middles = 4 * torch.arange(side) + 2.0 - CANVAS / 2
        self.register_buffer("cells", torch.stack([middles.repeat(side), middles.repeat_interleave(side)], 1))

    def forward(self, frames: Tensor) -> Tensor:
        return self.features(frames).softmax(1) @ self.cells  # (B, 64) (64, 2)


def learn_(name: str, net: nn.Module, images: Tensor, progress: Progress, seed: int = 0) -> None:
    """Trains on single frames, drawn anew at every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    uniform = functools.partial(torch.rand, generator=generator)
    net.train()
    for step in range(STEPS):
        rows = torch.randint(len(images), (2, BATCH), generator=generator)
        where = (2 * uniform(BATCH, 2) - 1) * (CANVAS - SIDE) / 2
        slow, angle = uniform(BATCH) < STEADY[name], 2 * torch.pi * uniform(BATCH)
        low, high = (torch.where(slow, SLOW[i], FAST[i]) for i in (0, 1))
        speed = low + (high - low) * uniform(BATCH)
        velocity = speed[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
        loss = functional.smooth_l1_loss(net(render(images[rows[0]], images[rows[1]], where, velocity)), where)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress(f"train, loss {loss.item():.3f}", step + 1, STEPS)
    net.eval()


def models(assets: Path, progress: Progress) -> dict[str, Model]:
    """Both networks, trained."""
    images = pictures(assets / "data" / "cifar10" / "train.parquet", NUM_TRAIN)
    preprocess = Preprocess(size=(CANVAS, CANVAS), resize=CANVAS, mean=MEAN, std=STD)
    found = {}
    for name in WIDTHS:
        torch.manual_seed(0)
        net = Network(WIDTHS[name])
        learn_(name, net, images, progress)
        found[name] = Model(name=f"{name} network", module=net, preprocess=preprocess, num_classes=2, origin={})
    return found


def outputs(model: Model, frames: Frames) -> np.ndarray:
    """(T, 2)."""
    with torch.inference_mode():
        return torch.cat([model.module(part) for part in frames.images.split(256)]).numpy()


def measure(assets: Path, progress: Progress) -> dict[str, Any]:
    """What thresholds that were found on some streams do on others, and what as many frames at random do; and times.

    The first row is the cheapest threshold with the big network's error on the streams that it was found on.
    """
    both = models(assets, progress)
    images = pictures(assets / "data" / "cifar10" / "test.parquet", NUM_TRAIN)
    calib, test = streams(images, NUM_CALIB, seed=1), streams(images, NUM_TEST, seed=2)
    costs = macs(both["small"]) / 1e6, macs(both["big"]) / 1e6
    seen, unseen = ({name: outputs(model, part) for name, model in both.items()} for part in (calib, test))
    found = switching.tried(seen["small"], seen["big"], calib.where.numpy(), calib.starts, costs)
    error = functools.partial(_error, wanted=test.where.numpy())
    chosen = [("error", 1.0, switching.cheapest(found, found[0].error))]
    chosen += [("mean", share, switching.best(found, share * costs[1])) for share in SHARES]
    rows = []
    for kind, value, switch in chosen:
        if switch is None:
            continue
        ran = switching.switched(unseen["small"], unseen["big"], test.starts, switch.threshold)
        random = np.random.default_rng(0)
        rows.append(
            {
                kind: value,
                "threshold": switch.threshold,
                "big_share_pct": 100 * float(ran.mean()),
                "mmacs": float((1 - ran.mean()) * costs[0] + ran.mean() * costs[1]),
                "error_px": error(_taken(unseen, ran)),
                "random_error_px": [error(_taken(unseen, random.permutation(ran))) for _ in range(RANDOM)],
            }
        )
    return {
        "mmacs": dict(zip(both, costs, strict=True)),
        "error_px": {name: error(unseen[name]) for name in both},
        "n_calibration": len(calib.images),
        "n_test": len(test.images),
        "thresholds": rows,
        "times": times(both, test, rows[0]["threshold"], progress),
        "environment": report.environment(("torch", "numpy", "openvino")),
    }


def times(both: dict[str, Model], frames: Frames, threshold: float, progress: Progress) -> dict[str, Any]:
    """Milliseconds of a frame on OpenVINO: each network alone, and switching; interleaved, on the first streams."""
    target = engines.get("openvino")
    images, starts = frames.images[:TIMED].numpy(), frames.starts[:TIMED]
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, model in both.items():
            target.lower(model, Path(folder, name))
            sessions[name] = target.open(Path(folder, name))
        stream = Stream(sessions["small"], sessions["big"], threshold)

        def switch() -> None:
            for frame, start in zip(images, starts, strict=True):
                if start:
                    stream.restart()
                stream(frame[None])

        def alone(session: Session) -> None:
            for frame in images:
                session(frame[None])

        runs = {name: functools.partial(alone, session) for name, session in sessions.items()} | {"switching": switch}
        ms = latency.interleave(runs, progress=progress)
    return {
        name: {"ms": latency.summary(each / TIMED), "speedup": latency.ratio(ms["big"], each)}
        for name, each in ms.items()
    }


def _taken(given: dict[str, np.ndarray], ran: np.ndarray) -> np.ndarray:
    return np.where(ran[:, None], given["big"], given["small"])


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).mean())
