"""torch itself: the reference. It runs what no other engine can, and rounds by simulation."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from martlet.engine.base import Engine, Op, Session, check_images, cores

if TYPE_CHECKING:
    from martlet.core.model import Model

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
WARM_UP = 1


class Torch(Engine):
    """Needs no file of its own: it runs the model that the artifact's weights and records rebuild."""

    name: ClassVar[str] = "torch"
    integer_kernels: ClassVar[bool] = False
    precisions: ClassVar[tuple[str, ...]] = tuple(DTYPES)
    profile_source: ClassVar[str] = "torch, operation by operation"

    def version(self) -> str:
        return torch.__version__

    def lower(self, model: Model, folder: Path) -> list[str]:
        self.check_precision(model.precision)
        return []

    def open(
        self,
        folder: Path,
        *,
        batch: int = 1,
        precision: str = "f32",
        threads: int | None = None,
        trust_code: bool = False,
    ) -> TorchSession:
        """Raises:
        EngineError: the precision isn't one of torch's.
        UsageError: the folder is no artifact; or the model came from a Python file, and it isn't trusted.
        """
        from martlet.core import store

        self.check_precision(precision)
        return TorchSession(store.load(folder).model(trust_code=trust_code), batch, precision, threads or cores())


class TorchSession(Session):
    """The model in inference mode, in one floating-point type."""

    def __init__(self, model: Model, batch: int, precision: str, threads: int) -> None:
        self.batch, self.threads = batch, threads
        self._size, self._dtype = model.preprocess.size, DTYPES[precision]
        self._module = model.module if isinstance(model.module, GraphModule) else model.module.eval()
        self._module.to(self._dtype)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        check_images(images, self.batch)
        with _threads(self.threads), torch.inference_mode():
            return self._module(torch.from_numpy(images).to(self._dtype)).float().numpy()

    def profile(self, images: np.ndarray, repeats: int = 10) -> list[Op]:
        """Runs the traced graph node by node. Fused attention is written out, and simulated rounding counts as what it
        is: floating point."""
        from martlet.graph.sites import sites
        from martlet.measure.macs import macs_by_node

        check_images(images, self.batch)
        graph_module = _traced(self._module, self._size, self._dtype)
        batch = torch.from_numpy(images).to(self._dtype)
        with _threads(self.threads), torch.inference_mode():
            for _ in range(WARM_UP):
                _Timed(graph_module).run(batch)
            timed = _Timed(graph_module)
            for _ in range(repeats):
                timed.run(batch)
        names = {site.node: site.name for site in sites(graph_module)}
        macs = macs_by_node(graph_module, timed.shapes)
        return [
            Op(
                name=names.get(node, node.name),
                kind=str(node.target).removeprefix("aten.").partition(".")[0],
                precision=NAMES.get(timed.dtypes[node], str(timed.dtypes[node]).removeprefix("torch.")),
                macs=macs[node].macs // self.batch if node in macs else 0,
                attention=node in macs and macs[node].attention,
                microseconds=timed.seconds[node] * 1e6 / repeats,
                sources=(node.name,),
            )
            for node in timed.shapes
            if node.op in ("call_function", "call_module")
        ]


class _Timed(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.seconds: defaultdict[Node, float] = defaultdict(float)
        self.shapes: dict[Node, torch.Size] = {}
        self.dtypes: dict[Node, torch.dtype] = {}

    def run_node(self, n: Node) -> object:
        start = time.perf_counter()
        value = super().run_node(n)
        self.seconds[n] += time.perf_counter() - start
        if isinstance(value, torch.Tensor):
            self.shapes[n], self.dtypes[n] = value.shape, value.dtype
        return value


def _traced(module: nn.Module, size: tuple[int, int], dtype: torch.dtype) -> GraphModule:
    """The graph of a module that is already in `dtype`; tracing takes float32."""
    from martlet.graph.trace import trace

    if isinstance(module, GraphModule):
        return module
    return trace(copy.deepcopy(module).float(), size).to(dtype)


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """torch knows one number of threads for the whole process; it gets it back."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
