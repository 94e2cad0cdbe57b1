"""What ways to learn reach beside each other, where a paper claims that one is better (results/learning.json).

    python benchmarks/learning.py                      # some hours of one thread
    python benchmarks/learning.py random tuned         # these comparisons alone
    python benchmarks/learning.py --workers 2          # seeds side by side

A comparison gives all of its recipes the same model and images, seed by seed, and tests them on the same others; the
first recipe is what the others are held against. Its rows that are there already aren't done again. Time is the
processor's, of all threads: set OMP_NUM_THREADS=1 for one.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peers
import train
from martlet.cli.terminal import note, working
from martlet.core import pipeline, report
from martlet.core.errors import MartletError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress, silent
from martlet.data.calibration import Calibration
from martlet.measure.macs import macs
from martlet.measure.size import params
from setups import learning_tasks as tasks
from setups.cifar import ASSETS
from setups.learning_tasks import Start

PACKAGES = ("torch", "timm", "peft", "accelerate", "numpy")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Recipes by a name each, that of the first being what others are held against.

    start: the model, images and whatever else is given, from the folder of assets, one that lasts for a seed, which is
    `{folder}` in recipes, and the seed. measures: besides top-1, of each trained model.
    """

    start: Callable[[Path, Path, int, Progress], Start]
    recipes: Mapping[str, str]
    seeds: Sequence[int] = (0, 1, 2)
    measures: Mapping[str, Callable[[Model, Start], float]] = field(default_factory=dict)


def on_more_images(recipes: Mapping[str, str]) -> Comparison:
    """The small ViT that knows CIFAR-10, with five times the images and one seed."""
    start = functools.partial(tasks.trained, images=10_000)
    return Comparison(start=start, recipes=recipes, seeds=(0,), measures={"before_pct": tasks.before})


RANDOM = "epochs: 20.0, batch: 64, rate: 0.001"
ROUNDED = train.QUANTIZE.format(bits=2, ranges="mse")
MERGING = "tome: {r: {1: 12, 4: 10}}"
TUNED, HALF_TUNED = (f"epochs: {epochs}, batch: 64" for epochs in (8.0, 4.0))
REPLAYED = "[fast_distill: {epochs: 10.0, batch: 64, rate: 0.001, stored: '{folder}/answers'}]"
STEPS_ALONE = "e2e_qp: {epochs: 32.0, batch: 32}"
TWO = "weight_bits: 2, activation_bits: 8, ranges: mse"
HALF = f"{ROUNDED}, teacher_intervention: {{epochs: 0.5, batch: 64, rate: 0.0005"
AFTER = "epochs: 5.0, batch: 64, rate: 0.0005"
SPARSE = "sparsegpt: {zeros: 4, of: 8, run: 2}"
RECOVERED = f"{SPARSE}, distill: {{{AFTER}, features: 1.0}}"
SHARED = {
    "shared, distill": f"[minivit: {{mixed: false}}, distill: {{{AFTER}}}]",
    "minivit, distill": f"[minivit, distill: {{{AFTER}}}]",
    "minivit, relations": f"[minivit, distill: {{{AFTER}, relations: 1.0}}]",
}
FLATNESS = {"eigenvalue": tasks.eigenvalue, "active_pct": tasks.active}
COMPARISONS = {
    "random": Comparison(
        start=tasks.random,
        recipes={
            "finetune": f"[finetune: {{{RANDOM}}}]",
            "sam": f"[sam: {{{RANDOM}}}]",
            "coat": f"[coat: {{{RANDOM}}}]",
            "skipvit": f"[skipvit, finetune: {{{RANDOM}}}]",
        },
        measures=FLATNESS,
    ),
    "few images": Comparison(
        start=functools.partial(tasks.random, images=500),
        recipes={way: f"[{way}: {{epochs: 100.0, batch: 64, rate: 0.001}}]" for way in ("finetune", "sam")},
        measures=FLATNESS,
    ),
    "augmented": Comparison(
        start=tasks.random,
        recipes={
            "dea, random": f"[dea: {{{RANDOM}, choice: random}}]",
            "dea": f"[dea: {{{RANDOM}}}]",
            "dea, all images": f"[dea: {{{RANDOM}, chosen: 1.0, choice: random}}]",
            "dea, random, whole": f"[dea: {{{RANDOM}, choice: random, whole: true}}]",
            "dea, whole": f"[dea: {{{RANDOM}, whole: true}}]",
        },
    ),
    "grown": Comparison(
        start=tasks.convolutions,
        recipes={
            "finetune": f"[finetune: {{{RANDOM}}}]",
            "progressive": f"[progressive: {{{RANDOM}, smallest: 32, stages: 3}}]",
        },
    ),
    "distilled": Comparison(
        start=tasks.student,
        recipes={
            "distill": "[distill: {epochs: 10.0, batch: 64, rate: 0.001}]",
            "fast_distill": REPLAYED,
            "fast_distill, replayed": REPLAYED,
        },
    ),
    "long-tailed": Comparison(
        start=tasks.long_tailed,
        recipes={
            "finetune": f"[finetune: {{{RANDOM}}}]",
            "deit": f"[deit_lt: {{{RANDOM}, beta: 0.0}}]",
            "deit_lt": f"[deit_lt: {{{RANDOM}}}]",
        },
        measures={"tail_pct": tasks.tail, "tail_cls_pct": tasks.tail_of_class, "tail_dist_pct": tasks.tail_of_teacher},
    ),
    "quantized": Comparison(
        start=tasks.trained,
        recipes={
            "lsq": f"[{ROUNDED}, lsq: {{{train.TRAIN}}}]",
            "teacher_intervention": f"[{HALF}}}]",
            "teacher_intervention, none": f"[{HALF}, intervened: 0.0}}]",
        },
    ),
    "two bits": Comparison(
        start=tasks.imagenet,
        recipes={
            "round to nearest": f"[fuse, uniform: {{{TWO}}}]",
            "gptq": "[fuse, gptq: {bits: 2, group_size: 0}]",
            "gptq, groups of 32": "[fuse, gptq: {bits: 2}]",
            "efficient-qat": f"[fuse, uniform: {{{TWO}, steps: 300, freedom: all}}, {STEPS_ALONE}]",
        },
    ),
    "pruned": Comparison(
        start=tasks.trained,
        recipes={
            way: f"[{way}: {{prune_ratio: 0.4}}, distill: {{{AFTER}}}]"
            for way in ("magnitude", "taylor", "nvit", "ziplm")
        },
        measures={"before_pct": tasks.before},
    ),
    "fewer blocks": Comparison(
        start=tasks.deep,
        recipes={
            f"{way}{told}": f"[fusegpt: {{blocks: 3, fuse: {fuse}}}{then}]"
            for told, then in (
                (", untrained", ""),
                (", 1 epoch", ", finetune: {epochs: 1.0, batch: 64, rate: 0.0001}"),
                ("", f", finetune: {{{TUNED}, rate: 0.0001}}"),
            )
            for way, fuse in (("dropped", "false"), ("fusegpt", "true"))
        },
        measures={"before_pct": tasks.before},
    ),
    "factorized": Comparison(
        start=tasks.trained,
        recipes={
            f"{way}, {then}": f"[{way}: {{ratio: 0.33, count: params}}, {then}: {{{AFTER}}}]"
            for way, then in (("svd", "distill"), ("svd", "pela"), ("afm", "pela"))
        },
        measures={"before_pct": tasks.before},
    ),
    "shared": Comparison(start=tasks.trained, recipes=SHARED, measures={"before_pct": tasks.before}),
    "shared, more images": on_more_images(SHARED),
    "sparse": Comparison(
        start=tasks.trained,
        recipes={
            "sparsegpt": f"[{SPARSE}]",
            "distill": f"[{RECOVERED}]",
            "gpusq-vit": f"[{RECOVERED}, uniform: {{weight_bits: 4, activation_bits: 8}}, lsq: {{{train.TRAIN}}}]",
        },
        measures={"before_pct": tasks.before},
    ),
    "sparse, more images": on_more_images(
        {
            "distill": f"[{RECOVERED}]",
            "gpusq-vit, 8 bits": f"[{RECOVERED}, uniform: {{weight_bits: 8, activation_bits: 8}}]",
            "gpusq-vit": f"[{RECOVERED}, uniform: {{weight_bits: 4, activation_bits: 8}}, lsq: {{{AFTER}}}]",
        }
    ),
    "sparse convolutions": Comparison(
        start=tasks.mobilenet,
        recipes={
            name: f"[fast_sparse_convnets: {{epochs: {epochs}, rate: {rate}, sparsity: {sparsity}}}]"
            for name, epochs, rate, sparsity in (
                ("80% zeros", 3.0, 0.002, 0.8),
                ("90% zeros", 3.0, 0.002, 0.9),
                ("80% zeros, longer", 6.0, 0.001, 0.8),
            )
        },
        seeds=(0,),
        measures={"before_pct": tasks.before},
    ),
    "unnormalized": Comparison(
        start=tasks.trained,
        recipes={way: f"[{way}: {{{AFTER}}}]" for way in ("distill", "unified_normalization")},
        measures={"before_pct": tasks.before},
    ),
    "unnormalized, more images": on_more_images(
        {"unified_normalization": "[unified_normalization: {epochs: 5.0, batch: 64, rate: 0.0015}]"}
    ),
    "never normalized": Comparison(
        start=tasks.student,
        recipes={way: f"[{way}: {{{RANDOM}}}]" for way in ("distill", "unified_normalization")},
    ),
    "tuned": Comparison(
        start=tasks.tuned,
        recipes={
            "lora": f"[lora: {{{TUNED}}}]",
            "lora_ga, half": f"[lora_ga: {{{HALF_TUNED}}}]",
            "light_peft": f"[light_peft: {{{TUNED}, prune_ratio: 0.46}}]",
            "finetune": f"[finetune: {{{TUNED}, rate: 0.0001}}]",
            "bitfit": f"[bitfit: {{{TUNED}}}]",
            "adapter": f"[adapter: {{{TUNED}}}]",
            "vpt": f"[vpt: {{{TUNED}}}]",
            "probe": f"[probe: {{{TUNED}, rate: 0.01}}]",
            "ladder": f"[ladder: {{{TUNED}}}]",
            "sherl": f"[sherl: {{{TUNED}}}]",
            "sherl, no spreading": f"[sherl: {{{TUNED}, spreads: false}}]",
            "sherl, wider": f"[sherl: {{{TUNED}, narrower: 2}}]",
        },
    ),
    "probed": Comparison(
        start=tasks.probed,
        recipes={
            "lora": f"[lora: {{{TUNED}}}]",
            "lora, half": f"[lora: {{{HALF_TUNED}}}]",
            "lora_ga, half": f"[lora_ga: {{{HALF_TUNED}}}]",
        },
    ),
    "merged tokens": Comparison(
        start=tasks.merged_tokens,
        recipes={name: f"[{MERGING}, {name}: {{{TUNED}}}]" for name in ("lora", "pyra")},
    ),
    **{
        f"prompted by {shots}": Comparison(
            start=tasks.prompted(shots),
            recipes={
                way: f"[vpt: {{epochs: 30.0, batch: {10 * shots}, rate: 0.005{begin}}}]"
                for way, begin in (("vpt", ""), ("vpt, started", ", start: '{folder}/prompts'"))
            },
            seeds=range(5),
        )
        for shots in (1, 2)
    },
    "two fine-tunes": Comparison(
        start=tasks.classes,
        recipes={"soup": "[soup]", "fisher": "[fisher]"},
        measures={"before_pct": tasks.before},
    ),
    "five fine-tunes": Comparison(
        start=tasks.domains,
        recipes={
            "task_arithmetic": "[task_arithmetic]",
            "soup": "[soup]",
            "ties": "[ties]",
            "opcm": "[opcm]",
        },
        measures={"before_pct": tasks.before},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Fills in the rows that are missing. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMPARISONS))
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results" / "learning.json")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with data and weights")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="only these")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes, each with a seed of its own")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - COMPARISONS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such comparison; there are {', '.join(COMPARISONS)}")
    document = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {"rows": []}
    document |= {"benchmark": "learning"}
    try:
        units = wanted(options.names or [*COMPARISONS], options.seeds, document["rows"])
        several = options.workers > 1
        rows = side_by_side(units, options.assets, options.workers) if several else in_turn(units, options.assets)
        for row in rows:
            note(f"{row['comparison']}, {row['way']}, seed {row['seed']}: {row['top1_pct']:.1f} %")
            document["rows"].append(row)
            document["created"] = datetime.now(UTC).isoformat(timespec="seconds")
            peers.write(options.out, document)
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


Unit = tuple[str, int, Sequence[str]]
"""Of a comparison's seed, the ways that aren't measured yet: they get the same start."""


def wanted(names: Sequence[str], seeds: Sequence[int] | None, rows: Sequence[Mapping[str, Any]]) -> list[Unit]:
    """What is missing, seed by seed."""
    done = {(row["comparison"], row["way"], row["seed"]) for row in rows}
    return [
        (name, seed, missing)
        for name in names
        for seed in COMPARISONS[name].seeds
        if (seeds is None or seed in seeds)
        and (missing := [way for way in COMPARISONS[name].recipes if (name, way, seed) not in done])
    ]


def in_turn(units: Sequence[Unit], assets: Path) -> Iterator[dict[str, Any]]:
    """Rows as they come, from this process."""
    for unit in units:
        with working(unit[0]) as progress:
            yield from measure(unit, assets, progress)


def side_by_side(
    units: Sequence[Unit], assets: Path, workers: int, fill: Callable[[Unit, Path], Iterator[Any]] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows as they come from so many processes. fill: what gives the rows of one unit, at the top of a module.

    Raises:
        MartletError: of the first process that raises one; what others had begun is lost.
    """
    context = multiprocessing.get_context("spawn")
    rows = context.Queue()
    with ProcessPoolExecutor(workers, context, _connect, (rows,)) as pool, working("comparisons") as progress:
        futures = [pool.submit(_fill, fill or measure, unit, assets) for unit in units]
        try:
            left = len(units)
            while left:
                try:
                    row = rows.get(timeout=1.0)
                except queue.Empty:
                    for future in futures:
                        if future.done():
                            future.result()
                    continue
                if row is not None:
                    yield row
                    continue
                left -= 1  # a unit is through, and all its rows are here
                progress("comparisons", len(units) - left, len(units))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _connect(rows: Any) -> None:
    global _rows
    _rows = rows


def _fill(fill: Callable[[Unit, Path], Iterator[Any]], unit: Unit, assets: Path) -> None:
    """In a process of `side_by_side`."""
    for row in fill(unit, assets):
        _rows.put(row)
    _rows.put(None)


_rows: Any = None
"""Where a process of `side_by_side` puts what it finds."""


def measure(unit: Unit, assets: Path, progress: Progress = silent) -> Iterator[dict[str, Any]]:
    """Rows of one seed of a comparison."""
    name, seed, ways = unit
    comparison = COMPARISONS[name]
    with tempfile.TemporaryDirectory() as folder:
        start = comparison.start(assets, Path(folder), seed, progress)
        for way in ways:
            yield {"comparison": name, **one(comparison, way, start, folder, seed, progress)}


def one(comparison: Comparison, way: str, start: Start, folder: str, seed: int, progress: Progress) -> dict[str, Any]:
    """A row: what one recipe makes of a start."""
    recipe = Recipe.from_yaml(f"martlet: 1\npasses: {comparison.recipes[way].replace('{folder}', folder)}")
    context = Context(
        images=Calibration(start.pool, start.model.preprocess, n=start.calibrated_on, seed=seed),
        training=start.images,
        teacher=start.teacher,
        finetunes=start.finetunes,
        seed=seed,
        progress=progress,
    )
    began = time.process_time()
    done = pipeline.run(start.model, recipe, context)
    seconds = time.process_time() - began
    record = done.steps[-1].record
    return {
        "way": way,
        "recipe": comparison.recipes[way],
        "seed": seed,
        "model": start.model.name,
        "images": len(start.images),
        "n_images": len(start.test),
        "simulated": done.simulated,
        "steps": record.get("steps", 0),
        "cpu_seconds": seconds,
        "parameters_removed_ratio": 1 - params(done.module) / params(start.model.module),
        "macs_removed_ratio": 1 - macs(done) / macs(start.model),
        "top1_pct": train.top1(done, start.test),
        **{name: function(done, start) for name, function in comparison.measures.items()},
        "environment": report.environment(PACKAGES),
    }


if __name__ == "__main__":
    sys.exit(main())
