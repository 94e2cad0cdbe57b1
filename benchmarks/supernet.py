"""Sizes and bits of a ViT, searched together or one after the other: one supernet, and CIFAR-10.

    python benchmarks/supernet.py train     # ten minutes of one core: every size of a small ViT, in shared weights
    python benchmarks/supernet.py search    # half an hour: what is found together, in turn, and by chance
    python benchmarks/supernet.py findings  # seconds: hypervolumes, ranks, and who beats plain int8

The small ViT that others trained is ordered by importance and trained on by the sandwich rule: in each step the whole,
the smallest and a drawn one learn, the latter two from the whole. A candidate has heads and hidden units of each block,
a depth, and bits of each Linear's weight; activations have 8. What is minimized is errors on images that nothing was
trained on, and bytes of weights; test images are others. Rounding is simulated in PyTorch. Everything that is found out
is kept (results/supernet.json), and what is there already isn't done again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import BaseTrial
from torch import Tensor, nn

import peers
from martlet.cli.terminal import note, working
from martlet.core import pipeline
from martlet.core.errors import MartletError, UsageError
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress
from martlet.data.examples import Examples
from martlet.functional import pareto
from martlet.functional.quantize.affine import affine_parameters, dequantize, quantize
from martlet.functional.quantize.formats import IntegerGrid
from martlet.functional.quantize.gptq import round_to_nearest
from martlet.recipe_search import strategies
from martlet.recipe_search.strategies.linas import Predictor
from setups.cifar import ASSETS
from setups.elastic import BLOCKS, DEPTH, HEADS, HIDDEN, SMALLEST, WHOLE, Choice, Elastic, examples, ordered_, subnet
from train import small, top1

BITS = (4, 8)
LINEARS = ("qkv", "proj", "fc1", "fc2")
LEAST = 0.5
"""Of a row's range, the least that its grid covers."""
NUM_TRAIN, NUM_VALID, NUM_CALIB, NUM_TEST = 5000, 1000, 32, 2000
EVALUATIONS, SEEDS = 48, (0, 1)
"""Of each search, and how often each is done."""
WORST = (60.0, 600_000.0)
"""Per cent of errors and bytes up to which volumes count."""
PACKAGES = ("torch", "timm", "optuna", "scikit-learn", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Does the parts that the command line names. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("train", "search", "findings"), metavar="PART")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results" / "supernet.json")
    parser.add_argument("--weights", type=Path, default=Path("runs/supernet.safetensors"), help="of the supernet")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder with data/cifar10 and weights")
    options = parser.parse_args(argv)
    document = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    document |= {
        "benchmark": "supernet",
        "settings": {"train": NUM_TRAIN, "valid": NUM_VALID, "test": NUM_TEST, "evaluations": EVALUATIONS},
    }
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def keep(**found: Any) -> None:
        document.update(found)
        peers.keep(options.out, document, PACKAGES)

    try:
        for part in options.parts:
            with working(part) as progress:
                if part == "train" and not options.weights.is_file():
                    keep(supernet=train(options, progress))
                elif part == "search":
                    for name, run in searches(document.get("searches", {}), options, progress):
                        keep(searches={**document.get("searches", {}), name: run})
                elif part == "findings":
                    keep(findings=tell(document, options, progress))
                    note(json.dumps(document["findings"], indent=1))
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


def train(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Trains the supernet and writes its weights."""
    from safetensors.torch import save_file

    source, start = ordered_(small(options.assets)), time.process_time()
    training = examples(options.assets, source, "train", NUM_TRAIN)
    technique = Elastic(epochs=1.0, rate=5e-4, batch=64)
    context = Context(training=training, progress=progress, kept=Kept.beside(options.weights))
    done = pipeline.run(source, Recipe((technique,)), context)
    options.weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(done.module.state_dict(), f"{options.weights}.part")
    os.replace(f"{options.weights}.part", options.weights)
    test = examples(options.assets, source, "test", NUM_TEST)
    sizes = {"whole": WHOLE, "smallest": SMALLEST}
    return {
        "images": len(training),
        "epochs": technique.epochs,
        "cpu_seconds": round(time.process_time() - start),
        "top1_pct": {
            "before": {name: top1(subnet(source, choice), test) for name, choice in sizes.items()},
            "after": {name: top1(subnet(done, choice), test) for name, choice in sizes.items()},
        },
    }


@dataclass
class Bench:
    """What candidates are evaluated with. Errors in per cent, bytes of weights."""

    supernet: Model
    valid: Examples
    calibration: Tensor
    test: Examples

    @classmethod
    def open(cls, options: argparse.Namespace) -> Bench:
        from safetensors.torch import load_file

        if not options.weights.is_file():
            raise UsageError(f"{options.weights} isn't there; python benchmarks/supernet.py train makes it")
        model = small(options.assets)
        model.module.load_state_dict(load_file(options.weights))
        # of the test images, for those that the small ViT was trained on before tell little
        held = examples(options.assets, model, "test", NUM_VALID + NUM_CALIB + NUM_TEST)
        valid, calibration, test = (
            Examples(
                held.pixels[rows], None if held.labels is None else held.labels[rows], held.preprocess, held.source
            )
            for rows in torch.arange(len(held)).split([NUM_VALID, NUM_CALIB, NUM_TEST])
        )
        return cls(model, valid, held.normalize(calibration.pixels), test)

    def __call__(self, choice: Choice) -> tuple[float, float]:
        model = self.rounded(choice)
        return 100 - top1(model, self.valid), self.weight_bytes(model, choice)

    def rounded(self, choice: Choice) -> Model:
        """The subnet with weights rounded to its bits, 8 where it has none, and 8-bit inputs of every Linear."""
        model = subnet(self.supernet, choice)
        rounded_(model.module, bits(choice), self.calibration)
        return model

    def weight_bytes(self, model: Model, choice: Choice) -> float:
        """Of rounded weights by their bits, with a scale of 4 bytes for each row; of all others, 4 bytes each."""
        its, total = bits(choice), 0.0
        for name, module in multiplying(model.module):
            weight = module.weight
            total += weight.numel() * its.get(name, 8) / 8 + 4 * len(weight) - 4 * weight.numel()
        return total + 4 * sum(parameter.numel() for parameter in model.module.parameters())


def bits(choice: Choice) -> dict[str, int]:
    """By the name of a Linear; without bits in the choice, none."""
    names = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    return {
        f"blocks.{i}.{names[linear]}": choice[f"{linear}{i}"]
        for i in range(choice["depth"])
        for linear in LINEARS
        if f"{linear}{i}" in choice
    }


def multiplying(module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    return ((name, its) for name, its in module.named_modules() if isinstance(its, nn.Linear | nn.Conv2d))


@torch.no_grad()
def rounded_(module: nn.Module, its: Mapping[str, int], calibration: Tensor) -> None:
    """Rounds weights by rows, symmetrically, and inputs to 8 bits between the least and the greatest value seen."""
    ranges: dict[str, Tensor] = {}

    def look(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ranges[name] = torch.stack(torch.aminmax(inputs[0]))

    found = dict(multiplying(module))
    handles = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in found.items()]
    module(calibration)
    for handle in handles:
        handle.remove()
    for name, layer in found.items():
        rows = round_to_nearest(layer.weight.flatten(1), IntegerGrid(its.get(name, 8), least=LEAST)).weight
        layer.weight.copy_(rows.view_as(layer.weight))
        grid = affine_parameters(*ranges[name], torch.uint8, symmetric=False)
        layer.register_forward_pre_hook(lambda _m, inputs, grid=grid: (dequantize(quantize(inputs[0], *grid), *grid),))


def sizes(trial: BaseTrial) -> dict[str, int]:
    """Draws a size."""
    found = {"depth": trial.suggest_categorical("depth", DEPTH)}
    for i in range(found["depth"]):
        found[f"heads{i}"] = trial.suggest_categorical(f"heads{i}", HEADS)
        found[f"hidden{i}"] = trial.suggest_categorical(f"hidden{i}", HIDDEN)
    return WHOLE | found


def together(trial: BaseTrial) -> dict[str, int]:
    """Draws a size and bits."""
    found = sizes(trial)
    return found | _bits(trial, found["depth"])


def in_turn(front: Sequence[Choice], trial: BaseTrial) -> dict[str, int]:
    """Draws one of the sizes that were found before, and bits."""
    found = dict(front[trial.suggest_categorical("member", tuple(range(len(front))))])
    return found | _bits(trial, found["depth"])


def _bits(trial: BaseTrial, depth: int) -> dict[str, int]:
    return {f"{linear}{i}": trial.suggest_categorical(f"{linear}{i}", BITS) for i in range(depth) for linear in LINEARS}


def explore(
    draw: Callable[[BaseTrial], dict[str, int]],
    evaluate: Callable[[Choice], tuple[float, float]],
    n: int,
    strategy: str,
    seed: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """So many evaluations of what a strategy draws, in order."""
    study, found = optuna.create_study(directions=[optuna.study.StudyDirection.MINIMIZE] * 2), []
    for number in range(n):
        progress(f"search by {strategy}", number, n)
        study.sampler = strategies.get(strategy)(1000 * seed + number, draw)
        trial = study.ask()
        choice = draw(trial)
        errors, weight_bytes = evaluate(choice)
        study.tell(trial, (errors, weight_bytes))
        found.append({"choice": choice, "errors_pct": errors, "bytes": weight_bytes})
    return found


def searches(
    known: Mapping[str, Any], options: argparse.Namespace, progress: Progress
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """All that isn't known yet, by name: together and in turn by each seed, and one by chance."""
    bench = Bench.open(options)
    runs: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "chance": partial(explore, together, bench, EVALUATIONS, "random", 0, progress)
    }
    for seed in SEEDS:
        runs[f"together {seed}"] = partial(explore, together, bench, EVALUATIONS, "linas", seed, progress)
        runs[f"in turn {seed}"] = partial(one_after_the_other, bench, seed, progress)
    for name, run in runs.items():
        if name not in known:
            yield name, run()


def one_after_the_other(bench: Bench, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """Half of the evaluations for sizes in 8 bits, the other half for bits of the best sizes."""
    first = explore(sizes, bench, EVALUATIONS // 2, "linas", seed, progress)
    members = pareto.front(points(first))
    front = [its["choice"] for its, member in zip(first, members, strict=True) if member]
    return first + explore(partial(in_turn, front), bench, EVALUATIONS // 2, "linas", seed, progress)


# ---- what it says


def points(found: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(n, 2), per cent of errors and bytes."""
    return np.array([[its["errors_pct"], its["bytes"]] for its in found])


def plain(bench: Bench) -> list[dict[str, Any]]:
    """Int8 baselines: the whole network and even cuts of it, all in 8 bits."""
    even = [
        {**WHOLE, **{f"heads{i}": h for i in BLOCKS}, **{f"hidden{i}": m for i in BLOCKS}}
        for h in HEADS
        for m in HIDDEN
    ]
    found = []
    for choice in even:
        errors, weight_bytes = bench(choice)
        found.append({"choice": choice, "errors_pct": errors, "bytes": weight_bytes})
    return found


def tell(document: Mapping[str, Any], options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Hypervolumes on the images searched on and on test images, predictors' ranks, and baselines that are beaten."""
    from scipy.stats import spearmanr

    bench = Bench.open(options)
    runs = {**document["searches"], "int8": plain(bench)}
    volumes: dict[str, Any] = {}
    tested: dict[str, np.ndarray] = {}
    for done, (name, run) in enumerate(runs.items()):
        progress("test fronts", done, len(runs))
        on_front = [its for its, member in zip(run, pareto.front(points(run)), strict=True) if member]
        on_front = run if name == "int8" else on_front
        tested[name] = np.array(
            [[100 - top1(bench.rounded(its["choice"]), bench.test), its["bytes"]] for its in on_front]
        )
        volumes[name] = {
            "searched_on": pareto.hypervolume(points(run), WORST),
            "test": pareto.hypervolume(tested[name], WORST),
            "front": tested[name].tolist(),
        }
    chance, found = runs["chance"], {}
    half = len(chance) // 2
    for column, name in ((0, "errors"), (1, "bytes")):
        values = points(chance)[:, column]
        predictor = Predictor([its["choice"] for its in chance[:half]], values[:half].tolist())
        predicted = predictor([its["choice"] for its in chance[half:]])
        found[name] = float(spearmanr(predicted, values[half:]).statistic)
    best = np.concatenate([its for name, its in tested.items() if name.startswith("together")])
    beaten = [bool(((best <= row).all(1) & (best < row).any(1)).any()) for row in tested["int8"]]
    return {
        "reference": {"errors_pct": WORST[0], "bytes": WORST[1]},
        "hypervolume": volumes,
        "predictor_spearman": {**found, "fitted": half, "held_out": len(chance) - half},
        "int8_beaten_on_test": f"{sum(beaten)} of {len(beaten)}",
    }


if __name__ == "__main__":
    sys.exit(main())
