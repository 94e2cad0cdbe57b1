"""Three questions about few bits, each answered in one run on the same images.

    python benchmarks/studies.py allocation --models hybrid    # do relevance and errors beat chance?
    python benchmarks/studies.py bridges --models hybrid       # does Q-HyViT beat min-max and RepQ-ViT?
    python benchmarks/studies.py rounding --models hybrid      # AdaRound, its preset, and five draws of each

`benchmarks/ptq.py` says which models, images and options; its models from CIFAR-10 have to be trained first. Writes one
JSON file, entry after entry; started again, it goes on where it stopped. Rounding is simulated in PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import peers
import ptq
from martlet.cli.terminal import note, working
from martlet.core.errors import MartletError
from martlet.core.recipe import Recipe
from martlet.graph import allocation
from martlet.graph.low_bit import LowBit
from setups import cifar
from setups.subjects import SUBJECTS

CHANCE = 3
"""How many random allocations."""
DRAWS = 5
"""Of calibration images."""


@dataclass(frozen=True)
class Try:
    """One line of a study. seed: of the calibration images; chance: the seed of a random allocation."""

    label: str
    recipe: Recipe
    seed: int = 0
    chance: int | None = None


def _allocations(bits: str) -> Iterator[Try]:
    """RepQ-ViT's grids with the same bits everywhere, with bits by a drawn relevance, and by each method."""
    base = Recipe.load(f"repq-vit-{bits}")
    yield Try(f"equal-{bits}", base)
    for seed in range(CHANCE):
        yield Try(f"random{seed}-{bits}", _with(base, allocation="relevance"), chance=seed)
    for method in allocation.ALLOCATIONS:
        yield Try(f"{method}-{bits}", _with(base, allocation=method))


def _bridges(bits: str) -> Iterator[Try]:
    for name in ("uniform", "repq-vit", "q-hyvit"):
        yield Try(f"{name}-{bits}", Recipe.load(f"{name}-{bits}"))
    yield Try(f"q-hyvit-{bits} without bridges", _with(Recipe.load(f"q-hyvit-{bits}"), bridge=False))


def _rounding(bits: str) -> Iterator[Try]:
    """To nearest, AdaRound and the preset; and the two with other calibration images."""
    adaround = Recipe.load(f"adaround-{bits}")
    yield Try(f"nearest-{bits}", _with(adaround, steps=0))
    for seed in range(DRAWS):
        yield Try(f"adaround-{bits}", adaround, seed)
        yield Try(f"gradient-ptq-{bits}", Recipe.load(f"gradient-ptq-{bits}"), seed)


STUDIES = {
    "allocation": (_allocations, ("w4a4", "w3a3")),
    "bridges": (_bridges, ("w8a8", "w6a6")),
    "rounding": (_rounding, ("w4a8",)),
}
"""What is tried, and with which bits unless others are asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit status."""
    options = _options(argv)
    settings = ptq.Settings(test_images=options.test_images)
    try:
        document = peers.open_document(options.out, settings, "studies", "entries", timed=False)
        for name in options.models:
            for entry in run(name, options, settings, document["entries"]):
                document["entries"].append(entry)
                peers.write(options.out, document)
                result = entry.get("error") or f"{entry['top1_pct']:.1f} % of {entry['top1_float_pct']:.1f} %"
                note(f"{entry['model']} {entry['recipe']}, draw {entry['draw']}: {result}")
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


def run(
    name: str, options: argparse.Namespace, settings: ptq.Settings, known: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The entries of one model and study that aren't known yet."""
    import torch

    from martlet.engine.base import cores

    tries, bits = STUDIES[options.study]
    model = SUBJECTS[name].load(options)
    there = {(e["study"], e["recipe"], e["draw"]) for e in known if ptq.is_of(e, name, model)}
    wanted = [each for its in options.bits or bits for each in tries(its)]
    todo = [each for each in wanted if (options.study, each.label, each.seed) not in there]
    if not todo:
        return
    torch.set_num_threads(cores())
    ready = ptq.prepare(name, model, options, settings)
    for each in todo:
        with working(f"{name} {each.label}, draw {each.seed}") as progress, _by_chance(each.chance):
            calibration = ready.calibration(each.seed)
            said = {"study": options.study, "draw": each.seed, **ready.entry(each.label)}
            yield said | ptq.measure(ready, each.recipe, calibration, settings, progress)


@contextmanager
def _by_chance(seed: int | None) -> Iterator[None]:
    """Within it, with a seed, `relevance` is one that is drawn."""
    random, real = np.random.default_rng(seed), allocation.layer_relevance
    if seed is not None:
        allocation.layer_relevance = lambda graph, found, *_: {site.node: float(random.random()) for site in found}
    try:
        yield
    finally:
        allocation.layer_relevance = real


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe(tuple(replace(t, **changes) if isinstance(t, LowBit) else t for t in recipe.passes))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=["hybrid"], metavar="NAME")
    parser.add_argument("--bits", nargs="*", metavar="wXaY", help="other than the study's own")
    parser.add_argument("--test-images", type=int, default=500, metavar="N")
    parser.add_argument("--small", type=Path, default=Path("runs/small"), help="folder that small_models.py wrote")
    parser.add_argument("--assets", type=Path, default=cifar.ASSETS, help="folder with data/ and weights/")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results/studies.json", help="results/studies.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
