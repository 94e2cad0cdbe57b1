"""What structure is worth on this machine's engines: sparse weights, attention of fewer keys, and norms that are gone.

    python benchmarks/kernels.py                       # all parts; a few minutes, on a quiet machine
    python benchmarks/kernels.py --parts sparse --seconds 20

sparse: the product of a weight (O, I), most of it zero, with I features of S places, as a 1 × 1 convolution of a
MobileNet has it: dense in PyTorch and OpenVINO; as rows of nonzeros in SciPy and PyTorch; in int8 on OpenVINO, which
can keep weights without zeros (CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE). networks: whole networks of such convolutions on
Martlet's engines, as they are, and with zeros that the engine torch skips. attention: one attention of a ViT-S for more
and more tokens on OpenVINO, whole, with linformer's sums, and with Linears of half their weights. norms: a ViT-Ti on
OpenVINO as it is, and with its norms in the Linears beside them. Weights are random: no time depends on their values.
Everything of a comparison is interleaved in one run. Writes one JSON file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import peers
from martlet import engine as engines
from martlet.cli.terminal import note, working
from martlet.core.errors import MartletError
from martlet.core.technique import Progress
from martlet.engine.base import cores
from martlet.measure import latency

PARTS = ("sparse", "networks", "attention", "norms")
CONVOLUTIONS = ((128, 64, 56 * 56), (256, 128, 28 * 28), (512, 512, 14 * 14), (1024, 1024, 7 * 7))
"""Outputs, inputs and places."""
SPARSITIES = (0.8, 0.9)
NETWORKS = ("mobilenetv1_100", "mobilenetv2_100", "efficientnet_b0")
TOKENS = (197, 577, 1025, 2049)
STRIDE = 4
"""Of linformer: about a sixteenth of the keys is left."""
Runs = Mapping[str, Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be equal for two results to stand in one file."""

    seed: int = 0
    threads: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing, for each comparison (default: 8)")
    parser.add_argument("--out", type=Path, default=peers.ROOT / "results/kernels.json", help="results/kernels.json")
    options = parser.parse_args(argv)
    settings = Settings(threads=cores())
    try:
        document = peers.open_document(options.out, settings, "kernels", "comparisons")
        for part in options.parts:
            for name, runs in COMPARISONS[part](settings):
                with working(name) as progress:
                    found = compared(runs, settings, options.seconds, progress)
                others = [entry for entry in document["comparisons"] if entry["name"] != name]
                document["comparisons"] = [*others, {"part": part, "name": name, "runs": found}]
                peers.write(options.out, document)
                note(f"{name}: " + ", ".join(f"{run} {its['speedup']['median']:.2f}×" for run, its in found.items()))
    except MartletError as error:
        note(str(error))
        return error.exit_status
    return 0


def compared(runs: Runs, settings: Settings, seconds: float, progress: Progress) -> dict[str, Any]:
    """Times, and each run's speed over the first's."""
    times = latency.interleave(runs, seed=settings.seed, min_seconds=seconds, progress=progress)
    first = next(iter(times.values()))
    return {
        name: {"latency_ms": latency.summary(ms), "speedup": latency.ratio(first, ms, settings.seed)}
        for name, ms in times.items()
    }


def sparse(settings: Settings) -> Any:
    """Of each convolution at each sparsity, the ways to compute it; all that aren't rounded give the same."""
    import scipy.sparse
    import torch

    torch.set_num_threads(settings.threads)
    rng = np.random.default_rng(settings.seed)
    for outputs, inputs, places in CONVOLUTIONS:
        x = rng.standard_normal((inputs, places), dtype=np.float32)
        for sparsity in SPARSITIES:
            weight = rng.standard_normal((outputs, inputs), dtype=np.float32)
            weight[rng.random(weight.shape) < sparsity] = 0
            rows, dense = scipy.sparse.csr_array(weight), torch.from_numpy(weight)
            theirs, given = dense.to_sparse_csr(), torch.from_numpy(x)
            runs = {
                "OpenVINO f32": openvino_product(weight, x, settings),
                "PyTorch f32": lambda dense=dense, given=given: (dense @ given).numpy(),
                "SciPy CSR": lambda rows=rows, x=x: rows @ x,
                "PyTorch CSR": lambda theirs=theirs, given=given: (theirs @ given).numpy(),
                "OpenVINO int8": openvino_product(weight, x, settings, int8=True),
                "OpenVINO int8, zeros left out": openvino_product(weight, x, settings, int8=True, rate=sparsity - 0.05),
            }
            expected = weight.astype(np.float64) @ x
            for name, run in runs.items():
                bound = 0.05 if "int8" in name else 1e-4
                error = np.abs(run() - expected).max() / np.abs(expected).max()
                if not error < bound:
                    raise MartletError(f"{name} gives something else: {error:.1e} of the largest product")
            yield f"{outputs} × {inputs}, {places} places, {sparsity:.0%} zeros", runs


def openvino_product(
    weight: np.ndarray, x: np.ndarray, settings: Settings, int8: bool = False, rate: float = 1.0
) -> Callable[[], np.ndarray]:
    """xᵀ Wᵀ as a fully connected layer, (S, O), of which the transpose is given. rate: of zeros, from which on weights
    are kept without them."""
    import openvino as ov
    from openvino import opset13 as ops

    given = ops.parameter(x.T.shape, np.float32)
    matrix, read = ops.constant(weight), given
    if int8:
        high = np.float32(np.abs(x).max())
        read = ops.fake_quantize(given, -high, high * 127 / 128, -high, high * 127 / 128, 256)
        tops = np.abs(weight).max(1, keepdims=True)
        matrix = ops.fake_quantize(matrix, -tops, tops, -tops, tops, 255)
    model = ov.Model([ops.matmul(read, matrix, False, True)], [given])
    config = {
        "INFERENCE_NUM_THREADS": settings.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": rate,
    }
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    images = np.ascontiguousarray(x.T)
    return lambda: request.infer({0: images}, share_inputs=True, share_outputs=True)[0].T


def networks(settings: Settings) -> Any:
    """Of each network, in which batch norms are folded, what it takes on engines; with and without zeros."""
    import torch

    from martlet.core import pipeline
    from martlet.core.recipe import Recipe
    from martlet.core.technique import Context
    from martlet.engine.torch import TorchSession
    from martlet.functional.structure.sparsity import least
    from martlet.nn.sparse import pointwise
    from martlet.source import load_model

    openvino = engines.get("openvino")
    rng = np.random.default_rng(settings.seed)
    image = rng.standard_normal((1, 3, 224, 224), dtype=np.float32)

    class Images:
        num_images = 8

        def __iter__(self) -> Any:
            yield torch.from_numpy(np.concatenate([image] * self.num_images))

    for name in NETWORKS:
        unfused = load_model(f"timm:{name}", weights="random", seed=settings.seed)
        whole = pipeline.run(unfused, Recipe.from_yaml("martlet: 1\npasses: [fuse]"), Context(images=Images()))
        dense = TorchSession(whole.copy(), 1, "f32", settings.threads)
        runs: dict[str, Callable[[], object]] = {"PyTorch f32": lambda dense=dense: dense(image)}
        runs |= {f"OpenVINO {each}": openvino_model(whole, each, image, settings) for each in floats()}
        context = Context(images=Images(), engine="openvino", int8=openvino.int8)
        int8 = pipeline.run(unfused, Recipe.load("int8"), context)
        runs["OpenVINO int8"] = openvino_model(int8, "f32", image, settings)
        for sparsity in SPARSITIES:
            model = whole.copy()
            with torch.no_grad():
                for layer in map(model.module.get_submodule, pointwise(model.module, model.preprocess.size)):
                    layer.weight.masked_fill_(least(layer.weight, sparsity), 0)  # type: ignore[operator, arg-type]
                expected = model.module(torch.from_numpy(image)).numpy()
            session = TorchSession(model, 1, "f32", settings.threads)
            error = np.abs(session(image) - expected).max() / np.abs(expected).max()
            if not error < 1e-3:
                raise MartletError(f"{name} without its zeros gives something else: {error:.1e} of the largest logit")
            runs[f"PyTorch f32, {sparsity:.0%} zeros skipped"] = lambda session=session: session(image)
        yield name, runs


def floats() -> list[str]:
    """What OpenVINO computes floating point in on this machine."""
    return [each for each in engines.get("openvino").alternatives() if each != "f16"]


def openvino_model(model: Any, precision: str, image: np.ndarray, settings: Settings) -> Callable[[], object]:
    """A whole model on Martlet's engine."""
    engine = engines.get("openvino")
    with tempfile.TemporaryDirectory() as folder:
        engine.lower(model, Path(folder))
        session = engine.open(Path(folder), precision=precision, threads=settings.threads)
    return lambda: session(image)


def attention(settings: Settings) -> Any:
    """Of each number of tokens, the ways to attend."""
    import torch
    from torch import nn

    from martlet.functional.structure.low_rank import of_weight
    from martlet.nn.attention import ShapedAttention
    from martlet.nn.low_rank import thin_linear
    from martlet.techniques.low_rank.linformer import cells
    from martlet.vit.token_run import Patches

    class Attention(ShapedAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attend(x)

    for tokens in TOKENS:
        torch.manual_seed(settings.seed)
        groups = cells(Patches(1, tokens - 1, None), STRIDE)
        whole = Attention(384, 6, 64, 64, 0.125)
        fewer = Attention(384, 6, 64, 64, 0.125, slots=(tokens, int(groups.max()) + 1))
        thinner = Attention(384, 6, 64, 64, 0.125)
        for name in ("qkv", "proj"):
            linear: Any = getattr(thinner, name)
            rank = linear.weight.numel() // (2 * sum(linear.weight.shape))
            setattr(thinner, name, thin_linear(linear, of_weight(linear.weight, linear.bias).at(rank)))
        assert fewer.slots is not None
        fewer.slots.set_(groups)
        layers: dict[str, nn.Module] = {"whole": whole, "linformer": fewer, "half of the Linears' weights": thinner}
        x = torch.randn(1, tokens, 384)
        yield (
            f"attention of {tokens} tokens",
            {name: openvino_layer(each, x, settings) for name, each in layers.items()},
        )


def openvino_layer(layer: Any, x: Any, settings: Settings) -> Callable[[], object]:
    """A module of PyTorch on OpenVINO, in float32."""
    import openvino as ov
    import torch

    exported = torch.export.export(layer.eval().requires_grad_(False), (x,))
    model = ov.convert_model(exported)
    config = {"INFERENCE_NUM_THREADS": settings.threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    given = x.numpy()
    with torch.no_grad():
        expected = layer(x).numpy()
    found = request.infer({0: given})[0]
    if not np.abs(found - expected).max() < 1e-3 * np.abs(expected).max():
        raise MartletError(f"OpenVINO gives something else of {type(layer).__name__} for {x.shape[1]} tokens")
    return lambda: request.infer({0: given}, share_inputs=True, share_outputs=True)


def norms(settings: Settings) -> Any:
    """A ViT-Ti as it is, and without norms to compute, in each precision of this machine."""
    from martlet.models.random_weights import randomize_
    from martlet.source import load_model
    from martlet.vit.norms import add_biases_, norm_sites, take_out_
    from martlet.vit.view import view

    whole = load_model("timm:vit_tiny_patch16_224", weights="random")
    randomize_(whole.module, settings.seed)
    without = whole.copy()
    sites = norm_sites(view(without.module), "norms")
    add_biases_(sites)
    take_out_(view(without.module), sites)
    image = np.random.default_rng(settings.seed).standard_normal((1, 3, 224, 224), dtype=np.float32)
    for precision in floats():
        models = {"whole": whole, "without norms": without}
        yield (
            f"vit_tiny_patch16_224 in {precision}",
            {name: openvino_model(model, precision, image, settings) for name, model in models.items()},
        )


COMPARISONS: Mapping[str, Callable[[Settings], Any]] = {
    "sparse": sparse,
    "networks": networks,
    "attention": attention,
    "norms": norms,
}

if __name__ == "__main__":
    sys.exit(main())
