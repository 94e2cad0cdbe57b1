"""Smaller networks without training: Martlet's techniques and Torch-Pruning's, on one model, images and count of MACs.

    python benchmarks/prune.py                                    # accuracy of every entry: an hour on a quiet core
    python benchmarks/prune.py --entries ziplm magnitude --ratios 0.4
    python benchmarks/prune.py --parts latency                    # OpenVINO, interleaved; needs a quiet machine
    python benchmarks/prune.py --parts table --table blocks.json  # what blocks take, for nvit's latency_table

Writes one JSON file, entry after entry; started again with the same settings, it goes on where it stopped. All entries
get the same calibration images and are tested on the same others. Torch-Pruning also gets the labels. Its ratio of
channels is searched until as many MACs are gone, counted as ours are: attention's products included.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
from martlet import engine as engines
from martlet.cli.terminal import note, show, table, working
from martlet.core import pipeline, registry, report
from martlet.core.errors import MartletError, UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress
from martlet.engine.base import cores
from martlet.measure import latency
from martlet.vit.budget import total_macs
from martlet.vit.latency_law import fit_law
from martlet.vit.structure import BlockShape, restore_structure_
from martlet.vit.view import view

if TYPE_CHECKING:
    from martlet.core.model import Model

MODEL, WEIGHTS = "timm:vit_tiny_patch16_224", "vit_tiny_patch16_224.in1k.safetensors"
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "ziplm": ("ziplm", {}),
    "taylor": ("taylor", {}),
    "magnitude": ("magnitude", {}),
    "taylor, no repair": ("taylor", {"repair": False}),
    "magnitude, no repair": ("magnitude", {"repair": False}),
}
THEIRS: dict[str, dict[str, Any]] = {
    f"Torch-Pruning {score}, {scope}{', bottleneck' if bottleneck else ''}": {
        "score": score,
        "global": scope != "local",
        "isomorphic": scope == "isomorphic",
        "bottleneck": bottleneck,
    }
    for score in ("magnitude", "taylor")
    for scope in ("local", "global", "isomorphic")
    for bottleneck in (True, False)
}
"""Its criteria for vision transformers: compared in a layer, in all layers, or in layers of one kind; with the width of
the residual stream left as it is (bottleneck), or cut too."""
ENTRIES = (*OURS, *THEIRS)
RATIOS = (0.2, 0.4)
ENGINE = "openvino"
BLOCKS = tuple(
    BlockShape(heads, qk, v, hidden)
    for heads, qk, v, hidden in (
        (3, 64, 64, 768),
        (3, 64, 64, 192),
        (3, 64, 16, 768),
        (3, 16, 64, 768),
        (3, 16, 16, 192),
        (2, 64, 64, 384),
        (2, 32, 32, 768),
        (1, 64, 64, 768),
        (1, 16, 16, 192),
        (1, 64, 16, 384),
    )
)
"""Sizes of a ViT-Ti's blocks and smaller ones."""
TIMED = ("ziplm",)
"""Entries of which speed is asked, each also followed by int8."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be equal for two entries to stand in one file."""

    calibration_images: int = 650
    seed: int = 0
    model: str = MODEL
    weights: str = WEIGHTS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit status."""
    options = _options(argv)
    settings = Settings()
    try:
        document = peers.open_document(options.out, settings, "prune", "entries")
        document["torch_pruning"] = importlib.metadata.version("torch-pruning")
        bench = None
        for ratio in options.ratios:
            for name in options.entries if "accuracy" in options.parts else ():
                if any((e["name"], e["prune_ratio"]) == (name, ratio) for e in document["entries"]):
                    note(f"{name} at {ratio} is in {options.out} already")
                    continue
                with working(f"{name} at {ratio}") as progress:
                    bench = bench or Bench(options.assets, settings, progress)
                    document["base_top1_pct"], document["n"] = bench.base_top1_pct, len(bench.test)
                    entry = bench.entry(name, ratio, progress)
                document["entries"].append(entry)
                peers.write(options.out, document)
        if "latency" in options.parts:
            with working("latency") as progress:
                bench = bench or Bench(options.assets, settings, progress)
                document["latency"] = timed(bench, options.seconds, progress)
            peers.write(options.out, document)
        if "table" in options.parts:
            with working("table") as progress:
                bench = bench or Bench(options.assets, settings, progress)
                peers.write(options.table, block_table(bench, options.seconds, progress))
    except MartletError as error:
        note(str(error))
        return error.exit_status
    show(_table(document))
    return 0


class Bench:
    """The model, the images that calibrate, and those that test."""

    def __init__(self, assets: Path, settings: Settings, progress: Progress) -> None:
        from martlet.data import open_images
        from martlet.data.calibration import Calibration
        from martlet.source import load_model

        self.settings = settings
        self.model = load_model(settings.model, weights=assets / "weights" / settings.weights, seed=settings.seed)
        pool = open_images(peers._images(assets, peers.VALIDATION))
        self.calibration = Calibration(
            pool,
            self.model.preprocess,
            n=settings.calibration_images,
            batch_size=25,
            seed=settings.seed,
            progress=progress,
        )
        self.labelled = peers.cropped(pool, self.model.preprocess)
        self.test = peers.cropped(open_images(peers._images(assets, peers.SAMPLE)), self.model.preprocess)
        self.macs = total_macs(self.model)
        self.base_top1_pct = self.top1_pct(self.model)

    def entry(self, name: str, prune_ratio: float, progress: Progress) -> dict[str, Any]:
        """Prunes and tests. A library that fails is an entry that says how."""
        start = time.process_time()
        fixed = {"name": name, "prune_ratio": prune_ratio}
        if name in OURS:
            found = self.ours(name, prune_ratio, progress)
        else:
            try:
                found = self.theirs(name, prune_ratio)
            except (RuntimeError, ValueError, ZeroDivisionError, IndexError) as error:
                return fixed | {"failed": peers._told(error)}
        return fixed | {
            "macs_removed_ratio": 1 - total_macs(found) / self.macs,
            "parameters": sum(p.numel() for p in found.module.parameters()),
            "top1_pct": self.top1_pct(found),
            "cpu_seconds": round(time.process_time() - start, 1),
        }

    def ours(self, name: str, prune_ratio: float, progress: Progress) -> Model:
        technique, settings = OURS[name]
        recipe = Recipe((registry.technique(technique).from_settings({"prune_ratio": prune_ratio, **settings}),))
        context = Context(images=self.calibration, seed=self.settings.seed, progress=progress)
        return pipeline.run(self.model, recipe, context)

    def theirs(self, name: str, prune_ratio: float) -> Model:
        """The least ratio of channels, to 1 in 200, that removes so many MACs."""
        low, high, found = 0.0, 1.0, None
        while high - low > 1 / 200:
            middle = (low + high) / 2
            pruned = replace(self.model, module=torch_pruning(self.model, THEIRS[name], middle, self._gradients))
            if total_macs(pruned) > (1 - prune_ratio) * self.macs:
                low = middle
            else:
                high, found = middle, pruned
        if found is None:
            raise UsageError(f"{name} can't remove {prune_ratio:.0%} of the MACs")
        return found

    def _gradients(self, score: str) -> dict[str, Any]:
        """Of the cross entropy with the labels, over all calibration images; computed once."""
        if not hasattr(self, "_found"):
            import torch

            from martlet.data.batches import batches

            twin = self.model.copy().module.eval().requires_grad_(True)
            crop = self.model.preprocess.override({"resize": None})
            for images, labels, _ in batches(self.labelled, crop, 25):
                loss = torch.nn.functional.cross_entropy(twin(torch.from_numpy(images)), torch.tensor(labels))
                loss.backward()
            self._found = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        return self._found if score == "taylor" else {}

    def top1_pct(self, model: Model) -> float:
        import torch

        from martlet.data.batches import batches

        right, crop = 0, model.preprocess.override({"resize": None})
        with torch.inference_mode():
            for images, labels, _ in batches(self.test, crop, 50):
                right += int((model.module(torch.from_numpy(images)).argmax(1) == torch.tensor(labels)).sum())
        return 100 * right / len(self.test)


def torch_pruning(
    model: Model, how: dict[str, Any], pruning_ratio: float, gradients: Callable[[str], dict[str, Any]]
) -> Any:
    """As its documentation prunes a vision transformer of timm: dimensions of heads, hidden units, and the width."""
    import torch
    import torch_pruning as tp
    from timm.layers import Attention, Mlp

    module: Any = model.copy().module.eval().requires_grad_(True)
    kept, heads = [module.head], {}
    for part in module.modules():
        if isinstance(part, Attention):
            part.fused_attn = False  # type: ignore[misc] # so that its trace sees the products
            heads[part.qkv] = part.num_heads
            kept += [part.proj] if how["bottleneck"] else []
        elif isinstance(part, Mlp):
            kept += [part.fc2] if how["bottleneck"] else []
    kept += [module.patch_embed] if how["bottleneck"] else []
    scores = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    pruner = tp.pruner.BasePruner(
        module,
        torch.zeros(1, 3, *model.preprocess.size),
        importance=scores[how["score"]](),
        global_pruning=how["global"],
        isomorphic=how["isomorphic"],
        pruning_ratio=pruning_ratio,
        ignored_layers=kept,
        num_heads=heads,
        prune_head_dims=True,
        round_to=8,
    )
    for name, parameter in module.named_parameters():
        parameter.grad = gradients(how["score"]).get(name)
    for group in pruner.step(interactive=True) or ():
        group.prune()
    for part in module.modules():
        if isinstance(part, Attention):
            part.num_heads = pruner.num_heads[part.qkv]
            part.head_dim = part.qkv.out_features // (3 * part.num_heads)
            part.attn_dim = part.num_heads * part.head_dim
    module.zero_grad()
    return module.requires_grad_(False)


def timed(bench: Bench, seconds: float, progress: Progress) -> list[dict[str, Any]]:
    """The whole model and the pruned ones on OpenVINO, in float and in int8, interleaved; batch 1."""
    engine = engines.get(ENGINE)
    context = Context(
        images=bench.calibration,
        seed=bench.settings.seed,
        int8=engine.int8,
        precisions=engine.alternatives(),
        progress=progress,
    )
    probe = next(iter(bench.calibration))[:1].numpy()
    with ExitStack() as stack:
        runs, macs_removed = {}, {}
        for name, model in _timed_models(bench, progress):
            for recipe in ("bf16", "int8"):
                done = pipeline.run(model, Recipe.load(recipe), context)
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                engine.lower(done, folder)
                session = engine.open(folder, precision=done.precision, threads=cores())
                runs[f"{name}, {recipe}"] = lambda session=session: session(probe)
                macs_removed[f"{name}, {recipe}"] = _removed(bench, model)
        times = latency.interleave(runs, seed=bench.settings.seed, min_seconds=seconds, progress=progress)
    wholes = {recipe: times[f"whole, {recipe}"] for recipe in ("bf16", "int8")}
    return [
        {
            "name": name,
            "macs_removed_ratio": macs_removed[name],
            "latency_ms": latency.summary(ms),
            "speedup": latency.ratio(wholes[name.rpartition(", ")[2]], ms, bench.settings.seed),
        }
        for name, ms in times.items()
    ]


def block_table(bench: Bench, seconds: float, progress: Progress) -> dict[str, Any]:
    """What a block of each of some sizes takes: the whole model, all of whose blocks have them, over its depth."""
    engine = engines.get(ENGINE)
    precision = "bf16" if "bf16" in engine.alternatives() else "f32"
    depth = len(view(bench.model.module).blocks)
    probe = next(iter(bench.calibration))[:1].numpy()
    runs = {}
    with ExitStack() as stack:
        for shape in BLOCKS:
            progress(f"prepare {shape}", 0, 0)
            model = bench.model.copy()
            blocks = [[i, *astuple(shape), True] for i in range(depth)]
            restore_structure_(model.module, {"blocks": blocks, "removed": [], "width": None})
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            engine.lower(model, folder)
            session = engine.open(folder, precision=precision, threads=cores())
            runs[shape] = lambda session=session: session(probe)
        named = {str(shape): run for shape, run in runs.items()}
        times = latency.interleave(named, seed=bench.settings.seed, min_seconds=seconds, progress=progress)
    rows = [asdict(shape) | {"latency_ms": latency.summary(times[str(shape)])["median"] / depth} for shape in runs]
    fit_law(rows)  # raises, if they don't hold together
    cpu = report.environment(peers.PACKAGES)["cpu"]
    return {"engine": ENGINE, "cpu": cpu, "floating_point": precision, "model": bench.settings.model, "blocks": rows}


def _timed_models(bench: Bench, progress: Progress) -> Iterator[tuple[str, Model]]:
    yield "whole", bench.model
    for name in TIMED:
        for ratio in RATIOS:
            yield f"{name} {ratio}", bench.ours(name, ratio, progress)


def _removed(bench: Bench, model: Model) -> float:

    return 1 - total_macs(model) / bench.macs


def _table(document: dict[str, Any]) -> Any:
    rows = [
        (
            entry["name"],
            f"{entry['prune_ratio']:.0%}",
            entry.get("failed") or f"{entry['macs_removed_ratio']:.1%}",
            f"{entry['top1_pct']:.1f}" if "top1_pct" in entry else "–",
        )
        for entry in sorted(document["entries"], key=lambda e: (e["prune_ratio"], -e.get("top1_pct", -1)))
    ]
    return table(("entry", "asked", "MACs removed", "top-1, %"), rows)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    assets = Path(os.environ.get("MARTLET_ASSETS", peers.ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("accuracy", "latency", "table"), default=["accuracy"])
    parser.add_argument("--entries", nargs="+", choices=ENTRIES, default=ENTRIES, metavar="NAME")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--assets", type=Path, default=assets, help="folder with data/ and weights/ (MARTLET_ASSETS)")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results/prune.json", help="results/prune.json")
    parser.add_argument("--table", type=Path, default=Path("blocks.json"), help="where to write what blocks take")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
