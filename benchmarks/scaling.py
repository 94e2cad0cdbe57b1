"""Can a network be judged before it is trained, or by short trainings of others? Small networks and CIFAR-10.

    python benchmarks/scaling.py networks             # minutes of one core: 32 short trainings, each kept as a row
    python benchmarks/scaling.py proxies seed grow    # minutes: measures without training, As-ViT's search and scaling
    python benchmarks/scaling.py findings             # a minute: rank correlations of what is there

Networks are ViTs in stages drawn from As-ViT's space, with widths and depths drawn too; of the first 20 all images have
32 pixels a side, of the others fewer. All see the same images as often. Writes one JSON file, row after row
(results/scaling.json); what is there already isn't done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peers
from martlet.cli.terminal import note, working
from martlet.core import pipeline
from martlet.core.errors import MartletError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress
from martlet.data import open_images
from martlet.data.examples import Examples
from martlet.data.preprocess import Preprocess
from martlet.measure.length_distortion import length_distortion
from martlet.measure.macs import macs_run
from martlet.measure.ntk_condition import ntk_condition
from martlet.measure.size import params
from martlet.models.compound import Factors, mobilevitv2
from martlet.recipe_search.scaling import factors as gaussian
from martlet.recipe_search.scaling.growth import Size, grow
from martlet.recipe_search.scaling.topology import reinforce
from martlet.techniques.tune.finetune import Finetune
from setups import scaling_nets
from setups.cifar import ASSETS, CLASSES, MEAN, STD
from train import top1

if TYPE_CHECKING:
    from torch import Tensor, nn

LARGE, SMALL = 20, 12
"""Networks of images of 32 pixels, which untrained measures are compared on, and of fewer."""
WIDTHS, DEPTHS, SIDES = (8, 16, 24, 32), (1, 2, 3), (16, 20, 24)
"""Channels of the first stage, blocks of each stage, and sides that are drawn from."""
NUM_TRAIN, EPOCHS, BATCH, RATE = 5000, 4.0, 128, 1.5e-3
NUM_TEST = 4000
WIDTH = 32
"""Of topologies that are searched without training, one block deep in each stage."""
POINTS, REPEATS, NTK_IMAGES = 10, 3, 16
"""Of the curve; networks that a measure is the mean of; images of the kernel. The official code has five networks."""
SPLITS, HELD = 30, 8
"""How often a process is fitted to other rows, and to how many it isn't, which it ranks."""
THIN = 4
"""Times narrower than what they stand for are the networks that are measured while one grows."""
MOST_MACS = 60e6
"""Where growing ends."""
TOLERANCE = 0.03
START = Size((1,) * scaling_nets.STAGES, WIDTH)
PACKAGES = ("torch", "timm", "numpy", "scipy", "scikit-learn")


def main(argv: Sequence[str] | None = None) -> int:
    """Does the parts that the command line names. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results" / "scaling.json")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with data/cifar10")
    options = parser.parse_args(argv)
    document = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    document |= {
        "benchmark": "scaling",
        "settings": {
            "train_images": NUM_TRAIN,
            "epochs": EPOCHS,
            "batch": BATCH,
            "rate": RATE,
            "test_images": NUM_TEST,
        },
    }
    try:
        for part in options.parts:
            with working(part) as progress:
                for found in PARTS[part](document, options.assets, progress):
                    document |= found
                    peers.keep(options.out, document, PACKAGES)
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


Found = Iterator[dict[str, Any]]


def train_networks(document: dict[str, Any], assets: Path, progress: Progress) -> Found:
    """Rows of trained networks."""
    rows = document.get("networks", [])
    for drawn in [*networks(seed=0)][len(rows) :]:
        module = scaling_nets.staged(drawn["choices"], drawn["width"], drawn["depths"], seed=0, num_classes=CLASSES)
        rows = [*rows, {**drawn, **trained(module, drawn["side"], assets, progress)}]
        note(f"{len(rows)}: {rows[-1]['top1_pct']:.1f} % in {rows[-1]['cpu_seconds']:.0f} s")
        yield {"networks": rows}


def networks(seed: int) -> Iterator[dict[str, Any]]:
    """Drawn topologies, widths, depths and sides."""
    rng = np.random.default_rng(seed)
    for i, choices in enumerate(scaling_nets.draw(LARGE + SMALL, seed)):
        yield {
            "choices": choices,
            "width": int(rng.choice(WIDTHS)),
            "depths": [int(rng.choice(DEPTHS)) for _ in range(scaling_nets.STAGES)],
            "side": scaling_nets.SIDE if i < LARGE else int(rng.choice(SIDES)),
        }


def factors_of(row: dict[str, Any]) -> dict[str, float]:
    """Global factors: the side, the first stage's channels, and blocks in all."""
    return {"resolution": row["side"], "width": row["width"], "depth": sum(row["depths"])}


def measure_proxies(document: dict[str, Any], assets: Path, progress: Progress) -> Found:
    """Measures, without training, of the large ones that were trained."""
    rows = document.get("networks", [])
    for i, row in enumerate(rows[:LARGE]):
        progress("measure", i, LARGE)
        if "length_distortion" not in row:
            start = time.process_time()
            row |= measures(row["choices"], Size(tuple(row["depths"]), row["width"]), assets)
            row["measure_cpu_seconds"] = round(time.process_time() - start, 2)
            yield {"networks": rows}


def find_seed(document: dict[str, Any], assets: Path, progress: Progress, steps: int = 500) -> Found:
    """The topology that REINFORCE finds by the measures alone."""
    if "seed" in document:
        return
    start, known = time.process_time(), dict[str, dict[str, float]]()

    def judge(choices: dict[str, int]) -> dict[str, float]:
        key = json.dumps(choices)
        if key not in known:
            known[key] = measures(choices, START, assets)
        return better(known[key])

    best: dict[str, int] = {}
    for step, (_, _, probable) in enumerate(reinforce(scaling_nets.SPACE, judge, steps=steps)):
        progress("search a seed", step, steps)
        best = probable
    seconds = time.process_time() - start
    note(f"seed {best} in {seconds / 60:.1f} CPU minutes")
    yield {"seed": {"choices": best, "steps": steps, "judged": len(known), **judge(best), "cpu_seconds": seconds}}


def grow_seed(document: dict[str, Any], assets: Path, progress: Progress) -> Found:
    """The seed, scaled by the measures alone until it has MOST_MACS."""
    if "growth" in document or "seed" not in document:
        return
    choices, start, way = document["seed"]["choices"], time.process_time(), []

    def whole(size: Size) -> Size:
        return Size(size.depths, size.width * THIN)

    def judge(size: Size) -> dict[str, float]:
        return better(measures(choices, size, assets))

    def fits(size: Size) -> bool:
        return macs(choices, whole(size)) <= MOST_MACS

    for size, its in grow(Size(START.depths, WIDTH // THIN), judge, fits):
        way.append({**asdict(whole(size)), **its, "macs": macs(choices, whole(size))})
        progress("grow", round(way[-1]["macs"] / 1e6), round(MOST_MACS / 1e6))
    seconds = time.process_time() - start
    note(f"{len(way)} sizes in {seconds / 60:.1f} CPU minutes")
    yield {"growth": {"sizes": way, "cpu_seconds": seconds}}


def tell(document: dict[str, Any], assets: Path, progress: Progress) -> Found:
    """Rank correlations of measures with accuracy, and how a Gaussian process ranks what it didn't see."""
    found: dict[str, Any] = {}
    rows = document.get("networks", [])
    if measured := [row for row in rows if "length_distortion" in row]:
        found["kendall_tau"] = correlations(measured)
    if len(rows) > HELD + 2:
        found["gaussian_process"] = held_out(rows) | {"mobilevitv2": emitted(rows)}
    for name, values in found.items():
        note(f"{name}: {json.dumps(values)}")
    yield {"findings": found}


def trained(module: nn.Module, side: int, assets: Path, progress: Progress) -> dict[str, Any]:
    """What a network reaches."""
    start, cpu = time.perf_counter(), time.process_time()
    preprocess = Preprocess(size=(side, side), resize=side, mean=MEAN, std=STD)
    model = Model(name="network", module=module, preprocess=preprocess, num_classes=CLASSES, origin={})
    training, test = (examples.at(preprocess) for examples in read(assets))
    technique = Finetune(epochs=EPOCHS, rate=RATE, batch=BATCH, warmup=0.1)
    done = pipeline.run(model, Recipe((technique,)), Context(training=training, progress=progress))
    return {
        "params": params(module),
        "macs": macs_run(module.eval().to("meta"), (side, side)),
        "top1_pct": top1(done, test),
        "steps": done.steps[-1].record["steps"],
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


@cache
def read(assets: Path) -> tuple[Examples, Examples]:
    """To train on, and to test on."""
    preprocess = Preprocess(size=(32, 32), resize=32, mean=MEAN, std=STD)
    folder = assets / "data" / "cifar10"
    pools = (
        open_images(folder / f"{name}.parquet", limit=n, seed=0)
        for name, n in (("train", NUM_TRAIN), ("test", NUM_TEST))
    )
    training, test = (Examples.read(pool, preprocess, CLASSES) for pool in pools)
    return training, test


@cache
def few(assets: Path) -> Tensor:
    """Images that the tangent kernel is of."""
    training, _ = read(assets)
    return training.normalize(training.pixels[:NTK_IMAGES])


def measures(choices: dict[str, int], size: Size, assets: Path) -> dict[str, float]:
    """Of a topology at a size, as they are."""

    def make(seed: int) -> nn.Module:
        return scaling_nets.staged(choices, size.width, size.depths, seed, num_classes=0)

    side = (scaling_nets.SIDE,) * 2
    return {
        "length_distortion": length_distortion(make, side, points=POINTS, repeats=REPEATS),
        "ntk_condition": ntk_condition(make, few(assets), repeats=REPEATS),
    }


def better(found: dict[str, float]) -> dict[str, float]:
    """Each the better the larger."""
    return {"length_distortion": found["length_distortion"], "-ntk_condition": -found["ntk_condition"]}


def macs(choices: dict[str, int], size: Size) -> int:
    """Of a network of this topology, with its classes."""
    module = scaling_nets.staged(choices, size.width, size.depths, 0, num_classes=CLASSES)
    return macs_run(module.eval().to("meta"), (scaling_nets.SIDE,) * 2)


def correlations(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Kendall's tau of each measure with top-1, and of the sum of ranks of both, with what a bootstrap says of it."""
    from scipy.stats import rankdata

    accuracy = np.array([row["top1_pct"] for row in rows])
    each = [better(row) for row in rows]
    columns = {name: np.array([measured[name] for measured in each]) for name in each[0]}
    columns["both"] = sum(rankdata(values) for values in columns.values())
    columns |= {name: np.array([row[name] for row in rows], dtype=float) for name in ("params", "macs")}
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(rows), size=len(rows)) for _ in range(300)]
    found = {
        name: {
            "tau": tau(values, accuracy),
            "interval_90": np.percentile([tau(values[d], accuracy[d]) for d in draws], [5, 95]).tolist(),
        }
        for name, values in columns.items()
    }
    return {"n": len(rows), "top1_spread_pct": float(np.std(accuracy)), "measures": found}


def tau(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic)


def held_out(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's correlation of predicted and reached top-1 on rows that a process wasn't fitted to."""
    from scipy.stats import spearmanr

    points, scores = [factors_of(row) for row in rows], np.array([row["top1_pct"] for row in rows])
    rng, found = np.random.default_rng(0), {"gaussian_process": list[float](), "macs": list[float]()}
    work = np.array([row["macs"] for row in rows], dtype=float)
    for _ in range(SPLITS):
        order = rng.permutation(len(rows))
        held, fitted = order[:HELD], order[HELD:]
        surrogate = gaussian.Surrogate([points[i] for i in fitted], scores[fitted])
        found["gaussian_process"].append(float(spearmanr(surrogate([points[i] for i in held])[0], scores[held])[0]))
        found["macs"].append(float(spearmanr(work[held], scores[held])[0]))
    one_out = [
        gaussian.Surrogate([p for j, p in enumerate(points) if j != i], np.delete(scores, i)).score(points[i])
        for i in range(len(rows))
    ]
    return {
        "n": len(rows),
        "fitted": len(rows) - HELD,
        "held_out": HELD,
        "splits": SPLITS,
        "spearman": {
            name: dict(zip(("median", "low", "high"), np.percentile(values, [50, 5, 95]).tolist(), strict=True))
            for name, values in found.items()
        },
        "spearman_one_left_out": float(spearmanr(one_out, scores)[0]),
    }


def emitted(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """MobileViTv2s of fewer and fewer MACs, derived from `mobilevitv2_100` by what the process expects of such factors.

    As shares of the largest that was trained, factors of one family are taken for those of the other.
    """
    surrogate = gaussian.Surrogate([factors_of(row) for row in rows], [row["top1_pct"] for row in rows])
    start, work = asdict(Factors()), _macs_of()
    most, found = work(start), []

    def score(point: gaussian.Point) -> float:
        depth = (point["convolutions"] + point["transformers"]) / 2
        return surrogate.score(
            {
                "resolution": scaling_nets.SIDE * point["resolution"] / start["resolution"],
                "width": max(WIDTHS) * point["width"],
                "depth": scaling_nets.STAGES * max(DEPTHS) * depth,
            }
        )

    for share in (0.75, 0.5, 0.25):
        way = gaussian.shrink(start, work, most * share, score, _smaller, TOLERANCE)
        its = work(way[-1])
        found.append(
            {
                "target_macs": round(most * share),
                "macs": its,
                "missed_pct": 100 * (its / (most * share) - 1),
                "factors": dict(way[-1]),
                "steps": len(way) - 1,
            }
        )
    return found


def _smaller(point: gaussian.Point) -> list[gaussian.Point]:
    return [asdict(factors) for factors in Factors(**point).smaller()]  # type: ignore[arg-type]


def _macs_of() -> Callable[[gaussian.Point], int]:
    import torch

    @cache
    def of(factors: Factors) -> int:
        with torch.device("meta"):
            return macs_run(mobilevitv2(factors).eval(), (factors.resolution,) * 2)

    return lambda point: of(Factors(**point))  # type: ignore[arg-type]


PARTS = {
    "networks": train_networks,
    "proxies": measure_proxies,
    "seed": find_seed,
    "grow": grow_seed,
    "findings": tell,
}


if __name__ == "__main__":
    sys.exit(main())
