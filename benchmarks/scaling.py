"""Can a network be judged before it is trained, or by short trainings of others? Small networks and CIFAR-10.

    python benchmarks/scaling.py topologies factors   # an hour of one core: 40 short trainings, each kept as a row
    python benchmarks/scaling.py proxies seed grow    # minutes: measures without training, As-ViT's search and scaling
    python benchmarks/scaling.py findings             # seconds: rank correlations of what is there

`topologies`: ViTs in stages drawn from As-ViT's space, all as wide and as deep; `factors`: MobileViTv2s of other
resolutions, widths and depths. All see as many images in the same schedule. Writes one JSON file, row after row
(results/scaling.json); what is there already isn't done again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peers
import scaling_nets
from cifar import ASSETS, CLASSES, MEAN, STD
from martlet.cli.terminal import note, working
from martlet.core import pipeline, report
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
from martlet.models.compound import Factors, mobilevitv2
from martlet.recipe_search.scaling import factors as gaussian
from martlet.recipe_search.scaling.growth import Size, grow
from martlet.recipe_search.scaling.topology import reinforce
from martlet.techniques.tune.finetune import Finetune
from train import top1

if TYPE_CHECKING:
    from torch import Tensor, nn

COUNT, NUM_TEST = 20, 4000
"""Networks of each part, and images they are tested on."""
WIDTH, DEPTHS = 32, (1, 1, 1)
"""Of all topologies."""
GRID = {
    "resolution": (32, 40, 48),
    "width": (0.25, 0.375, 0.5),
    "convolutions": (0.5, 1.0),
    "transformers": (0.25, 0.5, 1.0),
}
"""Global factors that are drawn from."""
POINTS, REPEATS, NTK_IMAGES = 10, 3, 16
"""Of the curve; networks that a measure is the mean of; images of the kernel: the official
code's, which takes the mean of five."""
SPLITS, HELD = 30, 8
"""How often a process is fitted to other rows, and to how many it isn't, which it ranks."""
THIN = 4
"""Times narrower than what they stand for are the networks that are measured while one grows."""
MOST_MACS = 60e6
"""Where growing ends."""
TOLERANCE = 0.03
PACKAGES = ("torch", "timm", "numpy", "scipy", "scikit-learn")


@dataclass(frozen=True)
class Schedule:
    """How all networks of a part are trained: so many images, so often."""

    images: int
    epochs: float
    rate: float
    batch: int = 64


SCHEDULES = {"topologies": Schedule(10_000, 3.0, 1e-3), "factors": Schedule(3000, 2.5, 2e-3)}


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
            "schedules": {name: asdict(schedule) for name, schedule in SCHEDULES.items()},
            "test_images": NUM_TEST,
            "width": WIDTH,
            "depths": list(DEPTHS),
        },
    }
    try:
        for part in options.parts:
            with working(part) as progress:
                for found in PARTS[part](document, options.assets, progress):
                    document |= found
                    document["created"] = datetime.now(UTC).isoformat(timespec="seconds")
                    document["environment"] = report.environment(PACKAGES)
                    peers.write(options.out, document)
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


Found = Iterator[dict[str, Any]]


def train_topologies(document: dict[str, Any], assets: Path, progress: Progress) -> Found:
    """Rows of trained ViTs of drawn topologies."""
    rows = document.get("topologies", [])
    for choices in [*scaling_nets.draw(COUNT, seed=0)][len(rows) :]:
        module = scaling_nets.staged(choices, WIDTH, DEPTHS, seed=0, num_classes=CLASSES)
        rows = [*rows, {"choices": choices, **trained("topologies", module, scaling_nets.SIDE, assets, progress)}]
        note(f"{choices}: {rows[-1]['top1_pct']:.1f} % in {rows[-1]['cpu_seconds']:.0f} s")
        yield {"topologies": rows}


def train_factors(document: dict[str, Any], assets: Path, progress: Progress) -> Found:
    """Rows of trained MobileViTv2s of drawn global factors."""
    import torch

    rows = document.get("factors", [])
    for point in [*drawn_factors(COUNT, seed=0)][len(rows) :]:
        factors = Factors(**point)
        torch.manual_seed(0)
        module = mobilevitv2(factors, num_classes=CLASSES)
        rows = [*rows, {"factors": point, **trained("factors", module, factors.resolution, assets, progress)}]
        note(f"{point}: {rows[-1]['top1_pct']:.1f} % in {rows[-1]['cpu_seconds']:.0f} s")
        yield {"factors": rows}


def measure_proxies(document: dict[str, Any], assets: Path, progress: Progress) -> Found:
    """Measures, without training, of the topologies that were trained."""
    rows = document.get("topologies", [])
    for i, row in enumerate(rows):
        progress("measure", i, len(rows))
        if "length_distortion" not in row:
            start = time.process_time()
            row |= measures(row["choices"], Size(DEPTHS, WIDTH), assets)
            row["measure_cpu_seconds"] = time.process_time() - start
            yield {"topologies": rows}


def find_seed(document: dict[str, Any], assets: Path, progress: Progress, steps: int = 500) -> Found:
    """The topology that REINFORCE finds by the measures alone."""
    if "seed" in document:
        return
    start, known = time.process_time(), dict[str, dict[str, float]]()

    def judge(choices: dict[str, int]) -> dict[str, float]:
        key = json.dumps(choices)
        if key not in known:
            known[key] = measures(choices, Size(DEPTHS, WIDTH), assets)
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

    for size, its in grow(Size(DEPTHS, WIDTH // THIN), judge, fits):
        way.append({**asdict(whole(size)), **its, "macs": macs(choices, whole(size))})
        progress("grow", round(way[-1]["macs"] / 1e6), round(MOST_MACS / 1e6))
    seconds = time.process_time() - start
    note(f"{len(way)} sizes in {seconds / 60:.1f} CPU minutes")
    yield {"growth": {"sizes": way, "cpu_seconds": seconds}}


def tell(document: dict[str, Any], assets: Path, progress: Progress) -> Found:
    """Rank correlations of measures with accuracy, and how a Gaussian process ranks what it didn't see."""
    found: dict[str, Any] = {}
    if rows := [row for row in document.get("topologies", []) if "length_distortion" in row]:
        found["kendall_tau"] = correlations(rows)
    if len(rows := document.get("factors", [])) > HELD + 2:
        found["gaussian_process"] = held_out(rows) | {"smaller": emitted(rows)}
    for name, values in found.items():
        note(f"{name}: {json.dumps(values)}")
    yield {"findings": found}


def trained(part: str, module: nn.Module, side: int, assets: Path, progress: Progress) -> dict[str, Any]:
    """What a network reaches by the part's schedule."""
    schedule, start, cpu = SCHEDULES[part], time.perf_counter(), time.process_time()
    preprocess = Preprocess(size=(side, side), resize=side, mean=MEAN, std=STD)
    model = Model(name=part, module=module, preprocess=preprocess, num_classes=CLASSES, origin={})
    training, test = (examples.at(preprocess) for examples in read(assets, schedule.images))
    technique = Finetune(epochs=schedule.epochs, rate=schedule.rate, batch=schedule.batch, warmup=0.1)
    done = pipeline.run(model, Recipe((technique,)), Context(training=training, progress=progress))
    return {
        "params": sum(parameter.numel() for parameter in module.parameters()),
        "macs": macs_run(module.eval().to("meta"), (side, side)),
        "top1_pct": top1(done, test),
        "steps": done.steps[-1].record["steps"],
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


@cache
def read(assets: Path, images: int) -> tuple[Examples, Examples]:
    """To train on, and to test on."""
    preprocess = Preprocess(size=(32, 32), resize=32, mean=MEAN, std=STD)
    folder = assets / "data" / "cifar10"
    pools = (
        open_images(folder / f"{name}.parquet", limit=n, seed=0) for name, n in (("train", images), ("test", NUM_TEST))
    )
    training, test = (Examples.read(pool, preprocess, CLASSES) for pool in pools)
    return training, test


@cache
def few(assets: Path) -> Tensor:
    """Images that the tangent kernel is of."""
    training, _ = read(assets, SCHEDULES["topologies"].images)
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
    draws = [rng.integers(len(rows), size=len(rows)) for _ in range(1000)]
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

    points, scores = [row["factors"] for row in rows], np.array([row["top1_pct"] for row in rows])
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
    """MobileViTv2s of fewer and fewer MACs, derived from the largest that is drawn, by what the process expects."""
    surrogate = gaussian.Surrogate([row["factors"] for row in rows], [row["top1_pct"] for row in rows])
    start = asdict(Factors(**{name: max(values) for name, values in GRID.items()}))  # type: ignore[arg-type]
    work, score = _macs_of(), surrogate.score
    found, most = [], work(start)
    for share in (0.75, 0.5, 0.35, 0.25):
        way = gaussian.shrink(start, work, most * share, score, _smaller, TOLERANCE)
        its = work(way[-1])
        found.append(
            {
                "target_macs": round(most * share),
                "macs": its,
                "missed_pct": 100 * (its / (most * share) - 1),
                "factors": dict(way[-1]),
                "steps": len(way) - 1,
                "expected_top1_pct": score(way[-1]),
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
            return macs_run(mobilevitv2(factors, num_classes=CLASSES).eval(), (factors.resolution,) * 2)

    return lambda point: of(Factors(**point))  # type: ignore[arg-type]


def drawn_factors(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """n different points of GRID, by chance."""
    rng, total = np.random.default_rng(seed), math.prod(map(len, GRID.values()))
    for i in rng.permutation(total)[:n]:
        places = np.unravel_index(int(i), [len(values) for values in GRID.values()])
        yield {name: values[int(p)] for (name, values), p in zip(GRID.items(), places, strict=True)}


PARTS = {
    "topologies": train_topologies,
    "factors": train_factors,
    "proxies": measure_proxies,
    "seed": find_seed,
    "grow": grow_seed,
    "findings": tell,
}


if __name__ == "__main__":
    sys.exit(main())
