"""Questions about few bits, each answered in one run on the same images.

    python benchmarks/studies.py allocation    # do relevance and errors beat chance?
    python benchmarks/studies.py bridges       # does Q-HyViT beat min-max and RepQ-ViT?
    python benchmarks/studies.py rounding      # AdaRound, its preset, and five draws of each
    python benchmarks/studies.py noise         # does NoisyQuant's noise do any good?
    python benchmarks/studies.py rotation      # MambaQuant on a state space model, beside Hadamard matrices alone
    python benchmarks/studies.py tokens        # GPTQ beside rounding to nearest, and RSQ's weights of tokens

Each has a model of its own that `--models` changes; `benchmarks/ptq.py` says which there are, and their images. Writes
one JSON file, entry after entry; started again, it goes on where it stopped. Rounding is simulated in PyTorch.
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
from martlet.graph.sequential import SequentialWeights
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


def _noise(bits: str) -> Iterator[Try]:
    noisy = Recipe.load(f"noisyquant-{bits}")
    yield Try(f"noisyquant-{bits}", noisy)
    yield Try(f"noisyquant-{bits} without noise", _with(noisy, noise=False))


def _rotation(bits: str) -> Iterator[Try]:
    """Grids of least squared error, with nothing rotated, Hadamard matrices alone, and all of MambaQuant."""
    mambaquant = Recipe.load(f"mambaquant-{bits}")
    yield Try(f"uniform-{bits} of least squared error", _with(Recipe.load(f"uniform-{bits}"), ranges="mse"))
    yield Try(f"mambaquant-{bits} with Hadamard matrices alone", _with(mambaquant, klt=False, smooth=False))
    yield Try(f"mambaquant-{bits}", mambaquant)


def _tokens(bits: str) -> Iterator[Try]:
    """Weights alone, with a scale for each group of 32 of them and for each row."""
    for size, scales in ((32, "groups of 32"), (0, "a scale a row")):
        rsq = _with(Recipe.load("rsq"), bits=int(bits[1:]), group_size=size)
        gptq = _with(Recipe.load("gptq-w3"), bits=int(bits[1:]), group_size=size)
        yield Try(f"rtn-{bits}, {scales}", _with(gptq, compensate=False))
        yield Try(f"gptq-{bits}, {scales}", gptq)
        yield Try(f"rsq-{bits}, {scales}, tokens alike", _with(rsq, tokens="equal"))
        yield Try(f"rsq-{bits}, {scales}", rsq)


STUDIES = {
    "allocation": (_allocations, ("w5a5", "w4a4", "w3a3"), "hybrid"),
    "bridges": (_bridges, ("w8a8", "w6a6"), "hybrid"),
    "rounding": (_rounding, ("w4a8",), "hybrid"),
    "noise": (_noise, ("w6a6", "w4a4"), "deit"),
    "rotation": (_rotation, ("w8a8", "w6a6", "w4a4"), "mamba"),
    "tokens": (_tokens, ("w3", "w2"), "deit"),
}
"""What is tried, and with which bits and on which model unless others are asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit status."""
    options = _options(argv)
    settings = ptq.Settings()
    try:
        document = peers.open_document(options.out, settings, "studies", "entries", timed=False)
        for name in options.models or [STUDIES[options.study][2]]:
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

    tries, bits, _ = STUDIES[options.study]
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
    return Recipe(
        tuple(replace(t, **changes) if isinstance(t, (LowBit, SequentialWeights)) else t for t in recipe.passes)
    )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, metavar="NAME", help="other than its own")
    parser.add_argument("--bits", nargs="*", metavar="wXaY", help="other than the study's own")
    parser.add_argument("--small", type=Path, default=Path("runs/small"), help="folder that small_models.py wrote")
    parser.add_argument("--assets", type=Path, default=cifar.ASSETS, help="folder with data/ and weights/")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results/studies.json", help="results/studies.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
