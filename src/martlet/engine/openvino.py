"""OpenVINO on CPU: the default engine."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from martlet.core.errors import EngineError
from martlet.core.report import cpu_flags
from martlet.core.technique import Int8Form
from martlet.engine.base import WHOLE, Engine, Op, Piece, Session, file_in, together

if TYPE_CHECKING:
    import openvino as ov

XML, BIN = f"{WHOLE}.xml", f"{WHOLE}.bin"
CAPABILITY = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
KERNEL_PRECISIONS = {"i8": "i8", "u8": "i8", "bf16": "bf16", "f16": "f16", "f32": "f32", "i32": "i32"}
WARM_UP = 3


class OpenVINO(Engine):
    """Intermediate representation (`model.xml`, `model.bin`), compiled for the CPU at a stated precision."""

    name: ClassVar[str] = "openvino"
    int8: ClassVar[Int8Form] = Int8Form(add=True)
    formats: ClassVar[frozenset[str]] = frozenset({"nf4"})
    precisions: ClassVar[tuple[str, ...]] = ("f32", "bf16", "f16")
    profile_source: ClassVar[str] = "OpenVINO runtime model"

    def version(self) -> str:
        return _openvino().__version__.split("-")[0]

    def alternatives(self) -> tuple[str, ...]:
        capabilities, flags = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), cpu_flags()
        # OpenVINO lists BF16 for every processor with AVX-512, and emulates it where there are no such instructions.
        emulated = {"bf16"} if "avx512f" in flags and "avx512_bf16" not in flags else set()
        return tuple(p for p in self.precisions if CAPABILITY[p] in capabilities and p not in emulated)

    def write(self, piece: Piece, folder: Path, stem: str) -> list[str]:
        from martlet.engine.onnx import write_onnx
        from martlet.nn.quantizers import ActivationQuantizer

        if any(isinstance(part, ActivationQuantizer) and part.format for part in piece.module.modules()):
            raise EngineError(
                f"{piece.model.name} rounds activations to 8-bit floats, which openvino leaves out; compress it with "
                "--engine onnxruntime or torch, which simulate it"
            )
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "model.onnx"
            write_onnx(piece, path)
            return self.convert(path, folder, piece.model.name, stem)

    def convert(self, path: Path, folder: Path, name: str, stem: str = WHOLE) -> list[str]:
        """Writes the engine's files for the one of a model of this name that `engine.onnx` wrote. Returns their names.

        Raises:
            EngineError: the engine refuses it.
        """
        ov = _openvino()
        try:
            read = _core().read_model(path)
            _restore_normal_floats_(read)
            ov.save_model(read, folder / f"{stem}.xml", compress_to_fp16=False)
        except RuntimeError as error:
            raise self.refuse(f"read {name}", error) from error
        return [f"{stem}.xml", f"{stem}.bin"]

    def read(self, folder: Path, stem: str, batch: int, precision: str, threads: int) -> OpenVINOSession:
        path = file_in(folder, f"{stem}.xml")
        file_in(folder, f"{stem}.bin")
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",  # else the inputs of 4-bit weights are rounded to int8 as they come
        }
        core = _core()
        try:
            model = core.read_model(path)
            model.reshape({i: [batch, *list(each.get_partial_shape())[1:]] for i, each in enumerate(model.inputs)})
            if _as_many_tokens_as_heads(model):
                config["SNIPPETS_MODE"] = "DISABLE"
            return OpenVINOSession(core, model, config)
        except RuntimeError as error:
            raise self.refuse(f"open {folder}", error) from error


class OpenVINOSession(Session):
    """A compiled model, and what is needed to compile it once more to look inside."""

    def __init__(self, core: ov.Core, model: ov.Model, config: Mapping[str, Any]) -> None:
        self._core, self._model, self._config = core, model, dict(config)
        compiled = self._compile()
        self.batch = model.inputs[0].shape[0]
        self.threads = compiled.get_property("INFERENCE_NUM_THREADS")
        self._request = compiled.create_infer_request()
        self._bound: dict[int, tuple[int, np.ndarray]] = {}

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        for i, each in enumerate(inputs):
            self._bind(i, np.require(each, requirements=("C", "W")))
        self._request.infer(share_outputs=True)
        return [tensor.data for tensor in self._request.output_tensors]

    def _bind(self, i: int, values: np.ndarray) -> None:
        """Has the engine read an input where it lies, which is told it anew only if that is elsewhere.

        What one stage gives to the next lies where it did in the last call. The request keeps no array alive.
        """
        address = values.__array_interface__["data"][0]
        if i not in self._bound or self._bound[i][0] != address:
            self._request.set_input_tensor(i, _openvino().Tensor(values, shared_memory=True))
            self._bound[i] = address, values

    def profile(self, images: np.ndarray | Sequence[np.ndarray], repeats: int = 10) -> list[Op]:
        compiled = self._compile(PERF_COUNT=True)  # apart, so that counting doesn't slow the session
        microseconds = _times(compiled.create_infer_request(), together(images), repeats)
        products = _products(self._model, self.batch)
        nodes = [_Node.read(op) for op in compiled.get_runtime_model().get_ordered_ops()]
        executed = _executed(products, nodes)
        inside = self._inside(products) if any(n.kind == "Subgraph" and executed[n.name] for n in nodes) else {}
        return [
            op
            for node in nodes
            for op in _ops(node, executed[node.name], microseconds.get(node.name, 0.0), inside)
            if op.macs or op.microseconds
        ]

    def _compile(self, **more: Any) -> ov.CompiledModel:
        return self._core.compile_model(self._model, "CPU", {**self._config, **more})

    def _inside(self, products: list[_Product]) -> dict[str, str]:
        """In which precision each product runs when it has a kernel of its own.

        The runtime model gives one precision for a whole fused subgraph, which may hold two products. The operands of
        each have their types before subgraphs are formed; so compiling without forming them shows product by product
        what the subgraph's kernels take.
        """
        try:
            compiled = self._compile(SNIPPETS_MODE="DISABLE")
        except RuntimeError:  # a plugin that doesn't know this property can't be asked: `unknown`
            return {}
        nodes = [_Node.read(op) for op in compiled.get_runtime_model().get_ordered_ops()]
        executed = _executed(products, nodes)
        return {p.names[0]: n.precision for n in nodes if n.kind != "Subgraph" for p in executed[n.name]}


class _Product(NamedTuple):
    """A multiplication of the model. names: its own, then those of the operations by constants that follow it."""

    macs: int
    attention: bool
    names: tuple[str, ...]


class _Node(NamedTuple):
    """A node of the runtime model. weights: the type of its second input."""

    name: str
    kind: str
    precision: str
    sources: tuple[str, ...]
    weights: str

    @classmethod
    def read(cls, op: ov.Node) -> _Node:
        info = op.get_rt_info()

        def text(key: str) -> str:
            return info[key].astype(str) if key in info else ""

        # primitiveType ends in the type that the kernel computes in: brgemm_avx512_I8, jit_avx512_bf16
        precision = text("primitiveType").rpartition("_")[2].lower()
        if precision not in KERNEL_PRECISIONS:
            precision = text("runtimePrecision").lower()
        return cls(
            op.get_friendly_name(),
            text("layerType"),
            KERNEL_PRECISIONS.get(precision, precision),
            tuple(s for s in text("originalLayersNames").split(",") if s),
            op.get_input_element_type(1).get_type_name() if op.get_input_size() > 1 else "",
        )


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise EngineError("openvino isn't installed; pip install openvino") from error
    return openvino


@cache
def _core() -> Any:
    """The process's only Core, kept until it ends.

    Each Core gives the thread a stack for signals, and puts back the one it found there when it goes. Of two that go in
    the order in which they came, the second puts back memory that is gone, and the next Ctrl-C is a segmentation fault.
    """
    return _openvino().Core()


def _times(request: ov.InferRequest, inputs: list[np.ndarray], repeats: int) -> dict[str, float]:
    """Mean microseconds of each executed node, by its name."""
    total: defaultdict[str, float] = defaultdict(float)
    for i in range(WARM_UP + repeats):
        request.infer(inputs, share_inputs=True)
        if i >= WARM_UP:
            for node in request.get_profiling_info():
                total[node.node_name] += node.real_time.total_seconds() * 1e6 / repeats
    return total


def _restore_normal_floats_(model: ov.Model) -> None:
    """What ONNX has to write as a lookup of 4-bit places in the table of NF4 becomes weights of that type."""
    import openvino as ov
    from openvino import opset13

    from martlet.functional.quantize.formats import table

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Gather":
            continue
        values, places = (node.input_value(i).get_node() for i in (0, 1))
        codes = places.input_value(0).get_node() if places.get_type_name() == "Convert" else places
        if values.get_type_name() == codes.get_type_name() == "Constant" and codes.get_element_type() == ov.Type.u4:
            assert isinstance(values, ov.op.Constant) and isinstance(codes, ov.op.Constant)
            if np.array_equal(values.data, np.array(table("nf4"), dtype=np.float32)):
                weight = opset13.constant(ov.Tensor(codes.data, codes.shape, ov.Type.nf4), shared_memory=False)
                node.output(0).replace(opset13.convert(weight, ov.Type.f32).output(0))


def _as_many_tokens_as_heads(model: ov.Model) -> bool:
    """Whether an attention has them.

    OpenVINO (2026.4) fuses attention by patterns of transposed shapes, takes the one for the other where tokens are as
    many as heads, and gives other logits. Without fused subgraphs they are right.
    """
    shapes = (op.get_output_shape(0) for op in model.get_ordered_ops() if op.get_type_name() == "Softmax")
    return any(len(shape) == 4 and shape[1] in shape[2:] for shape in shapes)


def _products(model: ov.Model, batch: int) -> list[_Product]:
    """Every multiplication that depends on the image, with its MACs per image."""
    found: list[_Product] = []
    depends: set[str] = set()

    def varies(op: ov.Node) -> list[bool]:
        return [op.input_value(i).get_node().get_friendly_name() in depends for i in range(op.get_input_size())]

    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        inputs = varies(op)
        if kind == "ShapeOf" or not (kind == "Parameter" or any(inputs)):
            continue
        depends.add(op.get_friendly_name())
        if macs := _macs(op, kind):
            found.append(_Product(macs // batch, kind == "MatMul" and all(inputs), (op.get_friendly_name(),)))
        elif kind in ("Multiply", "Divide", "Add", "Subtract") and sum(inputs) == 1:
            above = op.input_value(inputs.index(True)).get_node().get_friendly_name()
            for i, product in enumerate(found):
                if product.names[-1] == above:
                    found[i] = product._replace(names=(*product.names, op.get_friendly_name()))
    return found


def _macs(op: ov.Node, kind: str) -> int:
    if kind == "MatMul":
        a = list(op.get_input_shape(0))
        inner = a[-2] if op.get_attributes()["transpose_a"] and len(a) > 1 else a[-1]
        return prod(op.get_output_shape(0)) * inner
    if kind in ("Convolution", "GroupConvolution"):
        skip = 1 if kind == "Convolution" else 2  # weights (O, I, …) or (G, O, I, …)
        return prod(op.get_output_shape(0)) * prod(list(op.get_input_shape(1))[skip:])
    if kind in ("ConvolutionBackpropData", "GroupConvolutionBackpropData"):
        skip = 1 if kind == "ConvolutionBackpropData" else 2  # weights (I, O, …) or (G, I, O, …)
        return prod(op.get_input_shape(0)) * prod(list(op.get_input_shape(1))[skip:])
    return 0


def _executed(products: list[_Product], nodes: list[_Node]) -> dict[str, list[_Product]]:
    """The products that each node executed, by the node's name. Every product is in exactly one.

    A node lists the names that were fused into it. A product that took up the constant which follows it (a bias, a
    scale) may go by that one's name. One with weights of few bits lists names of others; its own is right.

    Raises:
        EngineError: a product is in several nodes, or in none.
    """
    kinds = ("FullyConnected", "MatMul", "Convolution", "Deconvolution", "Subgraph")
    by_source: defaultdict[str, list[str]] = defaultdict(list)
    own = {node.name: [node.name] for node in nodes if node.kind in kinds}
    for node in nodes:
        if node.kind in kinds:
            for source in node.sources:
                by_source[source].append(node.name)
    executed: defaultdict[str, list[_Product]] = defaultdict(list)
    for product in products:
        places = next((by_source[name] for name in product.names if by_source[name]), [])
        places = places or next((own[name] for name in product.names if name in own), [])
        if len(places) != 1:
            raise EngineError(
                f"openvino's runtime model shows {product.names[0]} in {len(places)} operations, so it isn't known in "
                "which precision it ran"
            )
        executed[places[0]].append(product)
    return executed


def _ops(node: _Node, products: list[_Product], microseconds: float, inside: Mapping[str, str]) -> Iterator[Op]:
    """One Op, or one for each precision in which a fused subgraph multiplied."""
    if not products:
        yield Op(
            name=node.name, kind=node.kind, precision=node.precision, microseconds=microseconds, sources=node.sources
        )
        return
    groups: defaultdict[tuple[str, bool], list[_Product]] = defaultdict(list)
    for product in products:
        precision = inside.get(product.names[0], "unknown") if node.kind == "Subgraph" else node.precision
        groups[precision, product.attention].append(product)
    for (precision, attention), members in groups.items():
        macs = sum(product.macs for product in members)
        yield Op(
            name=" + ".join(product.names[0].partition("/")[0] for product in members),
            kind=node.kind,
            precision=precision,
            macs=macs,
            attention=attention,
            microseconds=microseconds * macs / sum(product.macs for product in products),
            sources=node.sources if len(groups) == 1 else tuple(product.names[0] for product in members),
            weights=node.weights,
        )
