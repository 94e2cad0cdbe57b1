"""The contenders: one classifier through every engine and quantizer, each as its own documentation says to use it.

All run batch 1 on the same cores. What must be stated to make them comparable, and nothing else, is set: the number of
threads, OpenVINO's LATENCY hint and the precision of its floating-point parts, and that ONNX Runtime's threads don't
spin on after a call, in the next contender's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from martlet import engine as engines
from martlet.core import pipeline
from martlet.core.errors import EngineError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Progress, silent
from martlet.engine.base import Op, Session
from martlet.recipe_search import peers

if TYPE_CHECKING:
    from onnxruntime.quantization import CalibrationDataReader
    from torch import nn
    from torch.fx import GraphModule

    from martlet.core.model import Model
    from martlet.data.calibration import Calibration

BATCH = 1
INPUT = "images"
TRANSFORMER, PLAIN = "transformer", "plain"
"""NNCF's presets: model_type=TRANSFORMER, and no model type."""

FLOAT = "everything f32"
NNCF_BITS = (
    "8: weights of Linear and convolution (symmetric, per output channel), their inputs and those operands of "
    "attention products, additions and pools that NNCF chose; floating: norms, softmax and the remainder, in {floating}"
)
ORT_BITS = (
    "8: weights of Linear and convolution (symmetric, per output channel), inputs and outputs (per tensor) of every "
    "operator that onnxruntime.quantization lists by default, attention products included; f32: the remainder"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every contender gets.

    calibration: the same images, in the same preprocessing, for all. probe: float32 (1, 3, H, W), what is timed.
    """

    model: Model
    calibration: Calibration
    probe: np.ndarray
    threads: int
    seed: int = 0
    progress: Progress = silent

    def images(self) -> Iterator[np.ndarray]:
        """The calibration images, float32 (1, 3, H, W) each."""
        for batch in self.calibration:
            yield from batch.numpy()[:, None]


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A prepared contender.

    open: compiles it at batch 1 with the floating-point parts in this precision.
    precision: that at which it is timed. also: others at which its accuracy is measured too.
    bits: of every tensor kind, or in words where only the peer's documentation tells.
    """

    open: Callable[[str], Session]
    bits: dict[str, str] | str
    precision: str = "f32"
    also: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """name: `engine precision (by whom)`. prepare: writes its files into the folder; None if it doesn't apply."""

    name: str
    engine: str
    precision: str
    prepare: Callable[[Case, Path], Ready | None]


class Peer(Session):
    """A compiled peer that no engine of Martlet opens."""

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], threads: int) -> None:
        self.batch, self.threads, self._run = BATCH, threads, run

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._run(inputs[0])]

    def profile(self, images: np.ndarray | Sequence[np.ndarray], repeats: int = 10) -> list[Op]:
        raise EngineError("a peer's session doesn't tell what it ran")


def eager(case: Case, folder: Path | None = None) -> Ready:
    """The untouched model in PyTorch: also the reference for agreement."""
    return _torch(case, case.model.module, "eager")


def compiled(case: Case, folder: Path) -> Ready:
    """torch.compile with its default backend and mode."""
    import torch
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # a pool of compiler processes would hold gigabytes while others are timed
    torch._dynamo.reset()
    return _torch(case, cast("nn.Module", torch.compile(case.model.module)), "torch.compile, inductor")


def openvino_float(precision: str) -> Callable[[Case, Path], Ready]:
    """openvino.convert_model on the torch module."""

    def prepare(case: Case, folder: Path) -> Ready:
        import openvino as ov
        import torch

        from martlet.engine.openvino import XML

        example = torch.from_numpy(case.probe)
        converted = ov.convert_model(case.model.module, example_input=example, input=[case.probe.shape])
        ov.save_model(converted, folder / XML, compress_to_fp16=False)
        return _openvino(case, folder, f"everything {precision}", precision)

    return prepare


def nncf_int8(*, default: bool) -> Callable[[Case, Path], Ready]:
    """nncf.quantize on the converted model, with the preset that its documentation says, or with the other one."""

    def prepare(case: Case, folder: Path) -> Ready:
        preset = TRANSFORMER if peers.has_attention(case.model) == default else PLAIN
        return _nncf(case, folder, case.model.module, preset)

    return prepare


def nncf_fused(case: Case, folder: Path) -> Ready | None:
    """NNCF's default preset on the model with its training-time branches merged, where the model has such."""
    fused = pipeline.run(case.model, Recipe.load("fuse"), Context(seed=case.seed))
    if not fused.steps[-1].record["fused"]:
        return None
    return _nncf(case, folder, fused.module, TRANSFORMER if peers.has_attention(case.model) else PLAIN)


def onnxruntime_float(case: Case, folder: Path) -> Ready:
    """The file of torch.onnx.export."""
    path = _exported(case, folder / "model.onnx")
    return Ready(open=lambda _: _onnxruntime(case, path), bits=FLOAT, files=(path,))


def onnxruntime_static(case: Case, folder: Path) -> Ready:
    """onnxruntime.quantization.quantize_static: QDQ, weights per channel, min–max ranges; pre-processed as it asks."""
    from onnxruntime.quantization import QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, path = folder / "preprocessed.onnx", folder / "model.onnx"
    quant_pre_process(_exported(case, folder / "float.onnx"), plain)
    settings = {"quant_format": "QDQ", "per_channel": True, "calibrate_method": "MinMax"}
    quantize_static(
        plain, path, cast("CalibrationDataReader", _Reader(case)), quant_format=QuantFormat.QDQ, per_channel=True
    )
    return Ready(open=lambda _: _onnxruntime(case, path), bits=ORT_BITS, files=(path,), settings=settings)


def martlet_int8(engine_name: str) -> Callable[[Case, Path], Ready]:
    """The shipped recipe `int8`, in the form and the float precision that the engine computes fast in."""

    def prepare(case: Case, folder: Path) -> Ready:
        from martlet.graph.bits import bit_map

        engine = engines.get(engine_name)
        recipe = Recipe.load("int8")
        context = Context(
            images=case.calibration,
            seed=case.seed,
            int8=engine.int8,
            precisions=engine.alternatives(),
            progress=case.progress,
        )
        compressed = pipeline.run(case.model, recipe, context)
        files = engine.lower(compressed, folder)
        return Ready(
            open=lambda precision: engine.open(folder, batch=BATCH, precision=precision, threads=case.threads),
            bits=bit_map(cast("GraphModule", compressed.module), compressed.precision),
            precision=compressed.precision,
            also=() if compressed.precision == "f32" else ("f32",),
            files=tuple(folder / file for file in files),
            settings={"recipe": "int8", "digest": recipe.digest()},
        )

    return prepare


NNCF, OTHER_NNCF = "openvino int8 (NNCF)", "openvino int8 (NNCF, other)"
OPENVINO_FP32 = "openvino fp32"

CONTENDERS = (
    Contender("torch fp32 (eager)", "torch", "f32", eager),
    Contender("torch fp32 (compile)", "torch", "f32", compiled),
    Contender(OPENVINO_FP32, "openvino", "f32", openvino_float("f32")),
    Contender("openvino bf16", "openvino", "bf16", openvino_float("bf16")),
    Contender(NNCF, "openvino", "int8", nncf_int8(default=True)),
    Contender(OTHER_NNCF, "openvino", "int8", nncf_int8(default=False)),
    Contender("openvino int8 (NNCF, fused)", "openvino", "int8", nncf_fused),
    Contender("openvino int8 (Martlet)", "openvino", "int8", martlet_int8("openvino")),
    Contender("onnxruntime fp32", "onnxruntime", "f32", onnxruntime_float),
    Contender("onnxruntime int8 (static)", "onnxruntime", "int8", onnxruntime_static),
    Contender("onnxruntime int8 (Martlet)", "onnxruntime", "int8", martlet_int8("onnxruntime")),
)


def _torch(case: Case, module: nn.Module, mode: str) -> Ready:
    import torch

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return Ready(open=lambda _: Peer(run, case.threads), bits=FLOAT, settings={"mode": mode})


def _openvino(case: Case, folder: Path, bits: str, precision: str, settings: dict[str, Any] | None = None) -> Ready:
    """The files in the folder."""
    from martlet.engine.openvino import BIN, XML

    engine = engines.get("openvino")
    return Ready(
        open=lambda precision: engine.open(folder, batch=BATCH, precision=precision, threads=case.threads),
        bits=bits,
        precision=precision,
        also=("f32",) if settings and precision != "f32" else (),
        files=(folder / XML, folder / BIN),
        settings=settings or {},
    )


def _nncf(case: Case, folder: Path, module: nn.Module, preset: str) -> Ready:
    floating = "bf16" if "bf16" in engines.get("openvino").alternatives() else "f32"
    peers.nncf_int8(module, case.images(), folder, transformer=preset == TRANSFORMER)
    return _openvino(case, folder, NNCF_BITS.format(floating=floating), floating, {"preset": preset})


def _exported(case: Case, path: Path) -> Path:
    import torch

    example = torch.from_numpy(case.probe)
    torch.onnx.export(
        case.model.module, (example,), path, dynamo=True, external_data=False, input_names=[INPUT], verbose=False
    )
    return path


def _onnxruntime(case: Case, path: Path) -> Peer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Peer(lambda images: np.asarray(session.run(None, {INPUT: images})[0]), case.threads)


class _Reader:
    """The calibration images as onnxruntime.quantization takes them."""

    def __init__(self, case: Case) -> None:
        self._images = case.images()

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input by its name; None after the last."""
        image = next(self._images, None)
        return None if image is None else {INPUT: image}
