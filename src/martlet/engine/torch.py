"""torch itself: the reference. It runs what no other engine can, and rounds by simulation."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from martlet.engine.base import WHOLE, Engine, Op, Piece, Session, together
from martlet.nn.sparse import sparse_names, use_zeros_

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

    def write(self, piece: Piece, folder: Path, stem: str) -> list[str]:
        return []

    def sessions(
        self, folder: Path, batches: Mapping[str, Sequence[int]], precision: str, threads: int, trust_code: bool
    ) -> dict[str, dict[int, Session]]:
        """Raises:
        UsageError: the folder is no artifact; or the model came from a Python file, and it isn't trusted.
        """
        from martlet.core import store
        from martlet.graph.stages import stages

        model = store.load(folder).model(trust_code=trust_code)
        modules = [model.module]
        if [*batches] != [WHOLE]:
            modules = [stage.module for stage in stages(_traced(model.module, model.preprocess.size))]
        return {
            stem: {batch: TorchSession(model, batch, precision, threads, module) for batch in sizes}
            for (stem, sizes), module in zip(batches.items(), modules, strict=False)  # none of those past a cap
        }


class TorchSession(Session):
    """The model in inference mode, in one floating-point type.

    In f32, 1 × 1 convolutions skip their zeros where that is faster.

    module: the stage of the model, if not all of it.
    """

    def __init__(self, model: Model, batch: int, precision: str, threads: int, module: nn.Module | None = None) -> None:
        self.batch, self.threads = batch, threads
        self._size, self._dtype = model.preprocess.size, DTYPES[precision]
        module = module or model.module
        self._module = (module if isinstance(module, GraphModule) else module.eval()).to(self._dtype)
        if self._dtype is torch.float32 and not isinstance(module, GraphModule):
            use_zeros_(self._module, self._size)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        with _threads(self.threads), torch.inference_mode():
            found = self._module(*(torch.from_numpy(each).to(self._dtype) for each in inputs))
        return [each.float().numpy() for each in (found if isinstance(found, tuple) else [found])]

    def profile(self, images: np.ndarray | Sequence[np.ndarray], repeats: int = 10) -> list[Op]:
        """Runs the traced graph node by node. Fused attention is written out, and simulated rounding counts as what it
        is: floating point."""
        from martlet.graph.sites import sites
        from martlet.measure.macs import macs_by_node

        module = self._module
        graph_module = module if isinstance(module, GraphModule) else _traced(module, self._size).to(self._dtype)
        inputs = [torch.from_numpy(each).to(self._dtype) for each in together(images)]
        with _threads(self.threads), torch.inference_mode():
            for _ in range(WARM_UP):
                _Timed(graph_module).run(*inputs)
            timed = _Timed(graph_module)
            for _ in range(repeats):
                timed.run(*inputs)
        names = {site.node: site.name for site in sites(graph_module)} | sparse_names(graph_module)
        macs = macs_by_node(graph_module, timed.shapes)
        return [
            Op(
                name=names.get(node, node.name),
                kind=str(node.target).removeprefix("aten.").removeprefix("martlet.").partition(".")[0],
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


def _traced(module: nn.Module, size: tuple[int, int]) -> GraphModule:
    """The graph of a module, in float32, which is what tracing takes."""
    from martlet.graph.trace import trace

    return module if isinstance(module, GraphModule) else trace(copy.deepcopy(module).float(), size)


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """torch knows one number of threads for the whole process; it gets it back."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
