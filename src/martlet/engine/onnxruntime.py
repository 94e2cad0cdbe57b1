"""ONNX Runtime on CPU."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from martlet.core.errors import EngineError
from martlet.core.technique import Int8Form
from martlet.engine.base import BATCH, Engine, Op, Piece, Session, file_in, together

if TYPE_CHECKING:
    import onnx

PRECISIONS = {"float": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "i8", "int8": "i8"}
MULTIPLICATIONS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
WARM_UP = 3


class ONNXRuntime(Engine):
    """One ONNX file, compiled when it is opened."""

    name: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str | None] = "onnxruntime"
    int8: ClassVar[Int8Form] = Int8Form(attention_signed=False, add=True, hoist=False)
    profile_source: ClassVar[str] = "ONNX Runtime profile"

    def version(self) -> str:
        return _onnxruntime().__version__

    def write(self, piece: Piece, folder: Path, stem: str) -> list[str]:
        from martlet.engine.onnx import write_onnx

        return write_onnx(piece, folder / f"{stem}.onnx")

    def read(self, folder: Path, stem: str, batch: int, precision: str, threads: int) -> ONNXRuntimeSession:
        _onnxruntime()
        path = file_in(folder, f"{stem}.onnx")
        try:
            return ONNXRuntimeSession(path, batch, threads)
        except Exception as error:
            raise self.refuse(f"open {folder}", error) from error


class ONNXRuntimeSession(Session):
    """A compiled model, and the file from which to compile it once more to look inside."""

    def __init__(self, path: Path, batch: int, threads: int) -> None:
        self.batch, self.threads, self._path = batch, threads, path
        self._session = _compile(path, batch, threads)
        self._names = [each.name for each in self._session.get_inputs()]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._session.run(None, dict(zip(self._names, inputs, strict=True)))

    def profile(self, images: np.ndarray | Sequence[np.ndarray], repeats: int = 10) -> list[Op]:
        import onnx

        inputs = together(images)
        graph = onnx.load(self._path).graph
        with tempfile.TemporaryDirectory() as folder:
            plain = _run(
                self._path, [each[:1] for each in inputs], 1, self.threads, Path(folder, "plain"), optimize=False
            )
            executed = _run(self._path, inputs, repeats, self.threads, Path(folder, "optimized"))
            optimized = onnx.load(Path(folder, "optimized.onnx"), load_external_data=False).graph
        outputs = {node.name: tuple(node.output) for node in optimized.node}
        products = _products(graph, plain)
        multiplying = {
            n: (n, *outputs.get(n, ())) for n, k in executed.items() if any(m in k.kind for m in MULTIPLICATIONS)
        }
        found = _attribute(products, multiplying)
        return [
            Op(
                name=found[name].name.partition("/")[0] if name in found else name,
                kind=kernel.kind,
                precision=kernel.precision,
                macs=found[name].macs if name in found else 0,
                attention=name in found and found[name].attention,
                microseconds=kernel.microseconds,
                sources=(found[name].name,) if name in found else (name,),
            )
            for name, kernel in executed.items()
        ]


class _Kernel(NamedTuple):
    """A node as it was executed. inputs, outputs: shapes."""

    kind: str
    precision: str
    microseconds: float
    inputs: list[list[int]]
    outputs: list[list[int]]


class _Product(NamedTuple):
    """A multiplication of the file. keys: names by which a fused kernel may call it."""

    name: str
    macs: int
    attention: bool
    keys: tuple[str, ...]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError("onnxruntime isn't installed; pip install 'martlet[onnxruntime]'") from error
    return onnxruntime


def _compile(path: Path, batch: int, threads: int, profile: Path | None = None, optimize: bool = True) -> Any:
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_free_dimension_override_by_name(BATCH, batch)
    # Idle threads of one session would otherwise take the cores from the next one that is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Rewriting s8 as u8 fails where a rounding was moved past a reshape.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    # Weights of few bits are multiplied in float32; by itself it would round their inputs to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights leave no shape
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
        options.optimized_model_filepath = f"{profile}.onnx"
    # Fusing a Linear's bias into Gemm comes before int8 kernels are chosen, and leaves it in floating point.
    return ort.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
    )


def _run(
    path: Path, inputs: list[np.ndarray], repeats: int, threads: int, prefix: Path, optimize: bool = True
) -> dict[str, _Kernel]:
    """What was executed, by the node's name, in order, with the mean time over the repeats."""
    session = _compile(path, len(inputs[0]), threads, prefix, optimize)
    warm_up = WARM_UP if optimize else 0
    for _ in range(warm_up + repeats):
        session.run(None, {each.name: value for each, value in zip(session.get_inputs(), inputs, strict=True)})
    events: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            events[event["name"].removesuffix("_kernel_time")].append(event)
    return {name: _kernel(found[warm_up:]) for name, found in events.items()}


def _kernel(events: list[dict[str, Any]]) -> _Kernel:
    arguments = events[0]["args"]
    inputs = [next(iter(item.items())) for item in arguments["input_type_shape"]]
    outputs = [next(iter(item.items())) for item in arguments["output_type_shape"]]
    kind = arguments["op_name"]
    dtype = next((dtype for dtype, _ in (inputs or outputs)), "")
    return _Kernel(
        kind,
        "i8" if kind.startswith("DynamicQuantize") else PRECISIONS.get(dtype, dtype),
        sum(event["dur"] for event in events) / len(events),
        [shape for _, shape in inputs],
        [shape for _, shape in outputs],
    )


def _products(graph: onnx.GraphProto, plain: Mapping[str, _Kernel]) -> list[_Product]:
    """Every multiplication that depends on the image, from an unoptimized run on one image."""
    users: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    depends = {value.name for value in graph.input}
    found: list[_Product] = []
    for node in graph.node:
        if node.op_type == "Shape" or depends.isdisjoint(node.input):
            continue
        depends.update(node.output)
        if node.op_type in MULTIPLICATIONS:
            first, second = plain[node.name].inputs[:2]
            out = plain[node.name].outputs[0]
            if node.op_type in ("MatMul", "Gemm"):
                macs = prod(out) * first[-1]
            else:  # weights (O, I / groups, …); transposed: (I, O / groups, …)
                macs = prod(out if node.op_type == "Conv" else first) * prod(second[1:])
            found.append(
                _Product(
                    node.name,
                    macs,
                    node.op_type == "MatMul" and set(node.input) <= depends,
                    _keys(node, users, depends),
                )
            )
    return found


def _keys(node: onnx.NodeProto, users: Mapping[str, list[onnx.NodeProto]], depends: set[str]) -> tuple[str, ...]:
    """The names of a multiplication, and of what follows it and takes no other activation."""
    keys = [node.name, node.output[0]]
    while len(after := users.get(node.output[0], [])) == 1:
        node = after[0]
        if node.op_type in MULTIPLICATIONS or not depends.isdisjoint(set(node.input) - set(keys)):
            break
        keys += [node.name, node.output[0]]
    return tuple(keys)


def _attribute(products: list[_Product], executed: Mapping[str, tuple[str, ...]]) -> dict[str, _Product]:
    """Which product each kernel ran, by the kernel's name. Every product is in exactly one.

    executed: each kernel's own name and those of its outputs. ONNX Runtime names what it fused by the first or the
    last name, and adds to it: `blocks.0.attn.scores/MatMul/MatMulScaleFusion/`, `relu_1_nchwc`.

    Raises:
        EngineError: a product is in several kernels, or in none.
    """
    by_key = {key: product for product in products for key in product.keys}
    found: dict[str, _Product] = {}
    for kernel, names in executed.items():
        for name in names:
            while name and name not in by_key:
                name = name[: max(name.rfind("_"), name.rfind("/"), 0)]
            if name:
                found[kernel] = by_key[name]
                break
    count = Counter(product.name for product in found.values())
    for product in products:
        if count[product.name] != 1:
            raise EngineError(
                f"onnxruntime's profile shows {product.name} in {count[product.name]} operations, so it isn't known in "
                "which precision it ran"
            )
    return found
