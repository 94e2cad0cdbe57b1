"""Few bits, compared: every shipped method on the same models, bits, calibration images and test images.

    python benchmarks/ptq.py                                     # the whole grid: hours on two cores
    python benchmarks/ptq.py --models vit_tiny --recipes adalog martlet --bits w4a4 w3a3

Writes one JSON file, entry after entry; started again, it goes on where it stopped. Rounding is simulated in PyTorch:
there is an accuracy and no speed. A method that fails is an entry that says why.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peers
from martlet.cli.terminal import note, working
from martlet.core import pipeline, report
from martlet.core.errors import MartletError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress
from martlet.data import open_images
from martlet.data.calibration import Calibration
from martlet.measure import memory
from martlet.measure.fidelity import fidelity
from setups import cifar
from setups.subjects import SUBJECTS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from martlet.core.model import Model
    from martlet.data.images import Images

MODELS = ("vit_tiny", "deit", "swin", "hybrid")
"""A large and a small ViT, windows, and convolutions with attention: those whose weights are at hand."""
BITS = ("w8a8", "w6a6", "w4a4", "w3a3")
QUICK = (
    "uniform",
    "noisyquant",
    "ptq4vit",
    "q-hyvit",
    "mambaquant",
    "svdquant",
    "repq-vit",
    "lrp-qvit",
    "lrp-qvit-mixed",
    "mptq-vit",
    "dopq-vit",
    "adalog",
    "mixed",
)
LEARNED = ("adaround", "gradient-ptq", "qdrop", "repquant", "is-vit", "aphq-vit", "fima-q", "martlet", "martlet-mixed")
OTHERS = ("int8-f32", "i-vit", "qserve-w4a8", "rtn-w4", "gptq-w4", "rtn-w3", "gptq-w3")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be equal for two entries to stand in one file."""

    calibration_images: int = 128
    seed: int = 0
    batch: int = 25


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit status."""
    options = _options(argv)
    settings = Settings()
    try:
        document = peers.open_document(options.out, settings, "ptq", "entries", timed=False)
        for name in options.models:
            for entry in run(name, options, settings, document["entries"]):
                document["entries"] = [e for e in document["entries"] if _key(e) != _key(entry)] + [entry]
                peers.write(options.out, document)
                note(_line(entry))
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


def run(
    name: str, options: argparse.Namespace, settings: Settings, known: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The entries of one model that aren't known yet, in the order of recipes and bits."""
    import torch

    from martlet.engine.base import cores

    wanted = [f"{r}-{b}" for b in options.bits for r in options.recipes] + list(options.others)
    model = SUBJECTS[name].load(options)
    there = {e["recipe"] for e in known if is_of(e, name, model)}
    todo = [recipe for recipe in wanted if recipe not in there]
    if not todo:
        return
    torch.set_num_threads(cores())
    ready = prepare(name, model, options, settings)
    calibration = ready.calibration(settings.seed)
    for recipe in todo:
        with working(f"{name} {recipe}") as progress:
            yield ready.entry(recipe) | measure(ready, recipe, calibration, settings, progress)


@dataclass(frozen=True)
class Ready:
    """A subject with its images: those to draw calibration images from, and the test's (N, 3, H, W) with labels (N).

    exact: logits of the untouched model (N, K).
    """

    name: str
    model: Model
    pool: Images
    calibration_images: int
    x: Tensor
    labels: Tensor
    exact: np.ndarray

    def calibration(self, seed: int) -> Calibration:
        """One draw of calibration images."""
        return Calibration(self.pool, self.model.preprocess, n=self.calibration_images, batch_size=16, seed=seed)

    def entry(self, recipe: str) -> dict[str, Any]:
        """What every result says first."""
        subject = SUBJECTS[self.name]
        return {
            "model": self.name,
            "weights": self.model.origin["weights"],
            "recipe": recipe,
            "environment": report.environment(peers.PACKAGES),
            "images": {"calibration": subject.calibration, "test": subject.test},
            "calibration_n": self.calibration(0).num_images,
            "n": len(self.labels),
            "top1_float_pct": 100 * float((self.exact.argmax(1) == self.labels.numpy()).mean()),
        }


def is_of(entry: Mapping[str, Any], name: str, model: Model) -> bool:
    """Whether an entry is of this model with these weights."""
    return entry["model"] == name and entry["weights"] == model.origin["weights"]


def _key(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return entry["model"], entry["weights"], entry["recipe"]


def prepare(name: str, model: Model, options: argparse.Namespace, settings: Settings) -> Ready:
    """Loads a model's images, and computes what it says of them."""
    subject = SUBJECTS[name]
    pool, test = (open_images(options.assets / "data" / file) for file in (subject.calibration, subject.test))
    x, labels = cifar.read(test.sample(subject.test_images, settings.seed), model)
    exact = _logits(model.module, x, settings.batch)
    return Ready(name, model, pool, settings.calibration_images, x, labels, exact)


def measure(
    ready: Ready, recipe: str | Recipe, calibration: Calibration, settings: Settings, progress: Progress
) -> dict[str, Any]:
    """What one recipe leaves of a model: accuracy, closeness, bits of every kind of tensor; seconds and memory it took.

    The memory is all that the process holds, with PyTorch, the calibration and the test images.
    """
    from torch.fx import GraphModule

    from martlet.graph.bits import bit_map

    memory.forget_peak()
    start = time.perf_counter()
    try:
        applied = _recipe(recipe) if isinstance(recipe, str) else recipe
        context = Context(images=calibration, seed=settings.seed, progress=progress)
        done = pipeline.run(ready.model.copy(), applied, context)
        seconds, peak = time.perf_counter() - start, memory.process_peak_rss_bytes()
        logits = _logits(done.module, ready.x, settings.batch)
        found = fidelity(ready.exact, logits)
        assert isinstance(done.module, GraphModule)
        return {
            "top1_pct": 100 * float((logits.argmax(1) == ready.labels.numpy()).mean()),
            "agreement_pct": found["top1_agreement_pct"],
            "sqnr_db": found["logit_sqnr_db"],
            "simulated": True,
            "commit": peers.commit(),
            "seconds": round(seconds, 1),
            "peak_rss_bytes": peak,
            "bits": bit_map(done.module, "f32"),
        }
    except MartletError as error:
        return {"error": str(error)}


def _recipe(name: str) -> Recipe:
    """A shipped recipe; `mixed-wXaY`, RepQ-ViT's grids with bits by integer programme; `rtn-wX`, GPTQ's without it."""
    head, _, bits = name.rpartition("-")
    if head == "mixed":
        base = Recipe.load(f"repq-vit-{bits}")
        return Recipe(tuple(_with(t, "weight_bits", allocation="milp") for t in base.passes))
    if head == "rtn":
        return Recipe(tuple(_with(t, "damping", compensate=False) for t in Recipe.load(f"gptq-{bits}").passes))
    return Recipe.load(name)


def _with(technique: Any, field: str, **changes: Any) -> Any:
    return replace(technique, **changes) if hasattr(technique, field) else technique


def _logits(module: nn.Module, x: Tensor, batch: int) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return torch.cat([module(part) for part in x.split(batch)]).numpy()


def _line(entry: dict[str, Any]) -> str:
    result = entry.get("error") or f"{entry['top1_pct']:.1f} % of {entry['top1_float_pct']:.1f} %, {entry['seconds']} s"
    return f"{entry['model']} {entry['recipe']}: {result}"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--recipes", nargs="*", default=[*QUICK, *LEARNED], metavar="NAME", help="without bits")
    parser.add_argument("--bits", nargs="*", default=list(BITS), metavar="wXaY")
    parser.add_argument(
        "--others", nargs="*", default=list(OTHERS), metavar="NAME", help="with whatever bits they have"
    )
    parser.add_argument("--small", type=Path, default=Path("runs/small"), help="folder that small_models.py wrote")
    parser.add_argument("--assets", type=Path, default=cifar.ASSETS, help="folder with data/ and weights/")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results/ptq.json", help="results/ptq.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
