"""What each way to compute fewer tokens loses and gains: accuracy without training, features given back, times.

    python benchmarks/token_studies.py accuracy      # every technique on ViT-Ti, at equal numbers of tokens
    python benchmarks/token_studies.py features      # at 384 pixels: how close all tokens are given back
    python benchmarks/token_studies.py learned       # two models tuned after each, on CIFAR-10: an hour
    python benchmarks/token_studies.py compressed    # one LookupViT for several numbers of tokens, CIFAR-10: 20 minutes
    python benchmarks/token_studies.py maps          # whether what is kept lies on a pasted object: some minutes
    python benchmarks/token_studies.py windows       # of a Swin, by searched ratios and by one: some minutes
    python benchmarks/token_studies.py times         # against the untouched model, interleaved; a quiet machine
    python benchmarks/token_studies.py throughput    # of training that skips, and of packed images; a quiet machine

Writes one JSON file, entry after entry; started again, it goes on where it stopped. Accuracy and features are
PyTorch's, in float32, from ViT-Ti's real weights on the real images of --assets; times are of random weights. What is
tuned are a ViT of 0.55 M parameters with real weights, of 64 patches, and the ViT-Ti of benchmarks/exits.py.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import exits
import peers
from martlet import engine as engines
from martlet.cli.terminal import note, working
from martlet.core import pipeline, registry
from martlet.core.errors import MartletError
from martlet.core.kept import Kept
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress
from martlet.engine.base import cores
from martlet.measure import latency
from martlet.measure.fidelity import fidelity
from martlet.measure.macs import macs
from martlet.recipe_search.space import expected_drop_pct
from martlet.source import load_model
from setups import cifar
from token_parts import Some
from token_parts.counts import compressed
from token_parts.maps import maps
from token_parts.throughput import throughput
from token_parts.windows import windows

if TYPE_CHECKING:
    from torch import Tensor

    from martlet.core.model import Model
    from martlet.data.images import Images

WEIGHTS = "vit_tiny_patch16_224.in1k.safetensors"
PARTS = ("accuracy", "features", "learned", "compressed", "maps", "windows", "times", "throughput")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be equal for two entries to stand in one file. seconds: of timing one case."""

    seconds: float
    seed: int = 0
    batch: int = 25
    feature_images: int = 32


Case = tuple[str, Mapping[str, Any]]
"""A technique and its settings."""

EARLY, ONCE = dict.fromkeys(range(1, 11), 8), {5: 98}
"""Two schedules of about the same arithmetic: 8 tokens before each block but the first and last, or 98 at once."""
SCHEDULES: Mapping[str, Mapping[int, int]] = {"8 in blocks 1 to 10": EARLY, "98 in block 5": ONCE}
SCORES: Sequence[Case] = (
    ("tome", {}),
    ("tome", {"partition": "2x2"}),
    ("tome", {"partition": "2x2", "informativeness": 0.3}),
    ("mctf", {}),
    ("tps", {}),
    ("evit", {}),
    ("turbo", {"alpha": 0.0}),
    ("turbo", {"alpha": 10.0}),
    ("turbo", {"alpha": 100.0}),
    ("turbo", {"alpha": 100_000.0}),
)
GIVEN_BACK: Sequence[Case] = (
    ("expedit", {"clusters": [18, 18]}),
    ("expedit", {"clusters": [16, 16]}),
    ("tome", {"r": {5: 252}, "partition": "2x2"}),
    ("tps", {"r": {5: 252}}),
    ("tome", {"r": {5: 320}, "partition": "2x2"}),
    ("tps", {"r": {5: 320}}),
)


TUNED: Sequence[Case] = (
    ("skipvit", {}),
    ("stvit", {"tokens": [4, 4]}),
    ("ia_red2", {}),
    ("tome", {"r": {1: 32}}),
)
TUNING: Case = ("finetune", {"epochs": 3.0, "rate": 5e-4})
TUNED_TINY: Sequence[Case] = (*TUNED[:3], ("tome", {"r": {3: 50}}))
TUNING_TINY: Case = ("finetune", {"epochs": 1.0, "batch": 32, "rate": 1e-4, "precision": "bf16"})
SMALL = "vit_d128x4.cifar10.safetensors"


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What is timed against the untouched model. goal: how many times faster its paper says it is.

    stage: the layers whose own time is told as well, by the beginning of their names, as the engine accounts for it.
    """

    model: str
    size: int
    batch: int
    case: Case
    goal: float
    kwargs: Mapping[str, Any] | None = None
    stage: str = ""


TIMES = {
    "semantic tokens": Timed(
        model="deit_small_patch16_224", size=224, batch=8, case=("stvit", {"tokens": [4, 4]}), goal=1.8
    ),
    "policies": Timed(model="deit_small_patch16_224", size=224, batch=8, case=("ia_red2", {"steps": 0}), goal=1.3),
    "16 × 16 clusters at 384": Timed(
        model="vit_tiny_patch16_384", size=384, batch=1, case=("expedit", {"clusters": [16, 16]}), goal=1.4
    ),
    "windows at 512": Timed(
        model="swin_tiny_patch4_window7_224",
        size=512,
        batch=1,
        case=("sparsevit", {"ratio": dict.fromkeys(range(4, 10), 0.6)}),
        goal=1.0,
        kwargs={"img_size": 512, "window_size": 8},
        stage="layers.2.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit status."""
    options = _options(argv)
    settings = Settings(seconds=options.seconds)
    runs = {"accuracy": accuracy, "features": features, "learned": learned, "times": times, "throughput": throughput}
    runs["maps"] = lambda assets, settings, known: maps(assets, settings.seed, known)
    runs["windows"] = lambda assets, settings, known: windows(assets, settings.seed, known)
    runs["compressed"] = lambda assets, _settings, known: compressed(assets, known, Kept.beside(options.out))
    try:
        document = peers.open_document(options.out, settings, "token_studies", "entries")
        for part in options.parts:
            known = {(e["part"], e["name"]) for e in document["entries"]}
            for entry in runs[part](options.assets, settings, {name for p, name in known if p == part}):
                document["entries"].append({"part": part, **entry, "commit": peers.commit()})
                peers.write(options.out, document)
                note(_line(document["entries"][-1]))
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


def accuracy(assets: Path, settings: Settings, known: set[str]) -> Iterator[dict[str, Any]]:
    """Every score under both schedules, on all test images together."""
    cases = [
        (f"{_text((name, others))}, {said}", (name, {"r": schedule, **others}))
        for said, schedule in SCHEDULES.items()
        for name, others in SCORES
    ]
    todo = [(said, case) for said, case in cases if said not in known]
    if not todo:
        return
    model = load_model("timm:vit_tiny_patch16_224", weights=assets / "weights" / WEIGHTS)
    x, labels = _test_images(assets, model, settings)
    with working("the untouched model") as progress:
        exact, whole = _logits(model, x, settings, progress), macs(model)
    for said, case in todo:
        with working(said) as progress:
            done = _applied(model, case)
            logits = _logits(done, x, settings, progress)
        found = fidelity(exact, logits)
        yield {
            "name": said,
            "model": model.name,
            "weights": model.origin["weights"],
            "recipe": Recipe((_technique(case),)).to_yaml(),
            "images": f"{peers.SAMPLE} and {peers.VALIDATION}, less the {peers.HELD_OUT} that calibrate elsewhere",
            "n": len(labels),
            "macs": macs(done),
            "macs_float": whole,
            "top1_float_pct": _top1(exact, labels),
            "top1_pct": _top1(logits, labels),
            "agreement_pct": found["top1_agreement_pct"],
            "kl_mean": found["kl_mean"],
            "expected_drop_pct": expected_drop_pct(exact, logits),
        }


def features(assets: Path, settings: Settings, known: set[str]) -> Iterator[dict[str, Any]]:
    """The mean cosine of the last block's tokens, given back, with the untouched model's, at 384 pixels."""
    import torch

    todo = [case for case in GIVEN_BACK if _text(case) not in known]
    if not todo:
        return
    model = load_model(
        "timm:vit_tiny_patch16_224",
        weights=assets / "weights" / WEIGHTS,
        model_kwargs={"img_size": 384, "global_pool": "avg", "fc_norm": False},  # whose head reads all patches
    )
    x, _ = _test_images(assets, model, settings, settings.feature_images)

    def tokens(of: Model) -> Tensor:
        with torch.inference_mode():
            return torch.cat([of.module.forward_features(part) for part in x.split(4)])  # type: ignore[operator]

    exact, whole = tokens(model), macs(model)
    for case in todo:
        with working(_text(case)):
            done = _applied(model, case)
            cosine = torch.nn.functional.cosine_similarity(exact, tokens(done), dim=-1)
        yield {
            "name": _text(case),
            "model": f"{model.name} at 384 pixels",
            "weights": model.origin["weights"],
            "recipe": Recipe((_technique(case),)).to_yaml(),
            "n": len(x),
            "macs": macs(done),
            "macs_float": whole,
            "cosine_mean": float(cosine.mean()),
        }


@dataclass(frozen=True, kw_only=True)
class Host:
    """A model that was trained on CIFAR-10, what it is tuned by, and what it is tested on."""

    model: Model
    context: Context
    x: Tensor
    labels: Tensor
    images: str
    tuning: Case


def small_host(assets: Path, settings: Settings, progress: Progress) -> Host:
    """A ViT of 64 patches."""
    from martlet.data import open_images
    from martlet.data.calibration import Calibration
    from martlet.data.examples import Examples

    kwargs = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
    weights = assets / "weights" / SMALL
    model = load_model(
        "timm:vit_tiny_patch16_224",
        weights=weights,
        num_classes=10,
        model_kwargs=kwargs,
        preprocess=cifar.preprocess(32),
    )
    train, test = (open_images(assets / "data" / "cifar10" / f"{part}.parquet") for part in ("train", "test"))
    x, labels = cifar.read(test, model)
    return Host(
        model=model,
        context=Context(
            images=Calibration(train, model.preprocess, n=256, seed=settings.seed),
            training=Examples.read(train, model.preprocess, model.num_classes),
            seed=settings.seed,
            progress=progress,
        ),
        x=x,
        labels=labels,
        images="CIFAR-10, all 50,000 to tune on, all 10,000 to test",
        tuning=TUNING,
    )


def tiny_host(assets: Path, settings: Settings, progress: Progress) -> Host:
    """The ViT-Ti of `benchmarks/exits.py`, of 100 patches."""
    model, context, test = exits.prepared(Path("runs/exits"), assets, Path("runs/exits"), progress)
    x, labels = cifar.read(test, model)
    return Host(
        model=model,
        context=context,
        x=x,
        labels=labels,
        images=f"CIFAR-10, {exits.NUM_TRAIN:,} to tune on, {exits.NUM_TEST:,} to test",
        tuning=TUNING_TINY,
    )


def learned(assets: Path, settings: Settings, known: set[str]) -> Iterator[dict[str, Any]]:
    """Top-1 on CIFAR-10 as each technique leaves a ViT, and after it was tuned as the untouched one was."""
    for said, load, cases in (("small ViT", small_host, TUNED), ("ViT-Ti", tiny_host, TUNED_TINY)):
        all_cases = [("all tokens", ()), *((_text(case), (case,)) for case in cases)]
        todo = [(f"{said}, {name}", its) for name, its in all_cases if f"{said}, {name}" not in known]
        if not todo:
            continue
        with working(said) as progress:
            host = load(assets, settings, progress)
        whole = macs(host.model)
        for name, its in todo:
            with working(name) as progress:
                context = replace(host.context, progress=progress)
                fewer, tuning = Recipe(tuple(map(_technique, its))), _technique(host.tuning)
                before = pipeline.run(host.model, fewer, context)
                after = pipeline.run(before, Recipe((tuning,)), context)
                logits = [_logits(each, host.x, settings, progress) for each in (host.model, before, after)]
            yield {
                "name": name,
                "model": host.model.name,
                "weights": host.model.origin["weights"],
                "recipe": (fewer | tuning).to_yaml(),
                "images": host.images,
                "n": len(host.labels),
                "macs": macs(before),
                "macs_float": whole,
                **{
                    f"top1_{when}pct": _top1(each, host.labels.numpy())
                    for when, each in zip(("float_", "before_", ""), logits, strict=True)
                },
            }


def times(assets: Path, settings: Settings, known: set[str]) -> Iterator[dict[str, Any]]:
    """Each against the untouched model on OpenVINO, call by call in turn, both in float32."""
    engine, precision = engines.get("openvino"), "f32"
    for said, timed in TIMES.items():
        if said in known:
            continue
        with working(said) as progress, ExitStack() as stack:
            model = load_model(
                f"timm:{timed.model}",
                weights="random",
                seed=settings.seed,
                model_kwargs=timed.kwargs or {},
            )
            probe = np.random.default_rng(settings.seed).standard_normal(
                (timed.batch, 3, timed.size, timed.size), dtype=np.float32
            )
            models = {"untouched": model, "fewer": _applied(model, timed.case, probe)}
            runs: dict[str, Callable[[], object]] = {}
            stage_ms = {}
            for name, each in models.items():
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                each = pipeline.run(each, Recipe.load("fuse"), Context())
                engine.lower(each, folder)
                session = engine.open(folder, batch=timed.batch, precision=precision, threads=cores())
                runs[name] = functools.partial(session, probe)
                if timed.stage:
                    ops = session.profile(probe)
                    stage_ms[name] = sum(op.microseconds for op in ops if op.name.startswith(timed.stage)) / 1000
            ms = latency.interleave(runs, seed=settings.seed, min_seconds=settings.seconds, progress=progress)
        yield {
            "name": said,
            "model": timed.model,
            "weights": "random",
            "size": timed.size,
            "batch": timed.batch,
            "engine": {"name": "openvino", "version": engine.version()},
            "precision": precision,
            "recipe": Recipe((_technique(timed.case),)).to_yaml(),
            "macs": macs(models["fewer"]),
            "macs_float": macs(model),
            "goal": timed.goal,
            "latency_ms": {name: latency.summary(each) for name, each in ms.items()},
            "speedup": latency.ratio(ms["untouched"], ms["fewer"], settings.seed),
            **({"stage": timed.stage, "stage_ms": stage_ms} if timed.stage else {}),
        }


def _technique(case: Case) -> Any:
    name, settings = case
    return registry.technique(name).from_settings(settings)


def _applied(model: Model, case: Case, images: np.ndarray | None = None) -> Model:
    return pipeline.run(model, Recipe((_technique(case),)), Context(images=images if images is None else Some(images)))


def _test_images(assets: Path, model: Model, settings: Settings, n: int | None = None) -> tuple[Tensor, np.ndarray]:
    """Images (N, 3, H, W) of both sets, and labels (N,); the first n, or all."""
    import torch

    from martlet.data import open_images

    _, rest = open_images(peers._images(assets, peers.VALIDATION)).split(peers.HELD_OUT, settings.seed)
    sets: list[Images] = [open_images(peers._images(assets, peers.SAMPLE)), rest]
    if n is not None:
        sets = [rest.sample(n, settings.seed)]
    read = [cifar.read(images, model) for images in sets]
    return torch.cat([x for x, _ in read]), torch.cat([labels for _, labels in read]).numpy()


def _logits(model: Model, x: Tensor, settings: Settings, progress: Progress) -> np.ndarray:
    import torch

    parts = []
    with torch.inference_mode():
        for part in x.split(settings.batch):
            parts.append(model.module(part))
            progress("run images", sum(map(len, parts)), len(x))
    return torch.cat(parts).numpy()


def _top1(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((logits.argmax(1) == labels).mean())


def _text(case: Case) -> str:
    name, settings = case
    said = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"{name} ({said})" if said else name


def _line(entry: Mapping[str, Any]) -> str:
    if "on_object_pct" in entry:
        return f"{entry['name']}: {', '.join(f'{share:.0f} %' for share in entry['on_object_pct'])} on the object"
    if "macs" not in entry:
        return f"{entry['name']}: {entry['speedup']['median']:.2f} times as fast"
    share = f"{entry['macs'] / 1e9:.2f} of {entry['macs_float'] / 1e9:.2f} GMACs"
    if "relative_error" in entry:
        return f"{entry['name']}: {entry['top1_pct']:.2f} %, {share}"
    if "top1_pct" in entry:
        return f"{entry['name']}: {entry['top1_pct']:.2f} % of {entry['top1_float_pct']:.2f} %, {share}"
    if "cosine_mean" in entry:
        return f"{entry['name']}: cosine {entry['cosine_mean']:.3f}, {share}"
    return f"{entry['name']}: {entry['speedup']['median']:.2f} times as fast, {share}"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=" or ".join(PARTS))
    parser.add_argument("--assets", type=Path, default=cifar.ASSETS, help="folder with data/ and weights/")
    parser.add_argument(
        "--out", type=Path, default=peers.ROOT / "results/token_studies.json", help="results/token_studies.json"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, for each case")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
