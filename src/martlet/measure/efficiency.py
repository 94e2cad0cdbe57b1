"""How much of what the machine can multiply each layer uses, and how much its memory lets it use."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import nn
from torch.fx import GraphModule

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.technique import Progress, Stage, silent
from martlet.data.preprocess import Preprocess
from martlet.measure import latency

if TYPE_CHECKING:
    from martlet.engine.base import Op, Session

PEAK_SIDE, PEAK_WIDTH = 512, 1024
"""The dense product that is the peak: an image of 3 × 512 × 512 is 768 rows of 1024, times 1024 × 1024."""
COPIED_BYTES = 256 * 2**20
"""More than caches hold."""
TRIES = 15
"""Of the dense product, of which the best counts."""
ACCOUNTS, REPEATS = 5, 4
"""Of the engine's accounts of a call the median counts, each the mean of so many calls."""
FLOAT_BYTES = 4


class LayerEfficiency(TypedDict):
    """A kernel that multiplies; several layers, if the engine fused them.

    kind: `linear`, `conv`, `depthwise`, `scores`, `values` or `product`, of the first.
    bytes: of its operands and results, each read or written once.
    efficiency_pct: MACs a second over the peak. attainable_pct: what memory alone would allow of it.
    """

    name: str
    kind: str
    macs: int
    bytes: int
    microseconds: float
    efficiency_pct: float
    attainable_pct: float


class Efficiency(TypedDict):
    """Of one call with one image in float32.

    waterline_macs_per_byte: peak over bandwidth; layers below it wait for memory.
    latency_ms: the median call. operations_ms: the sum of what the engine says of each operation.
    efficiency_pct: of the whole, MACs / (peak × latency). other_microseconds: of operations that multiply nothing.
    """

    engine: str
    threads: int
    peak_gmacs_per_s: float
    bandwidth_gb_per_s: float
    waterline_macs_per_byte: float
    latency_ms: float
    operations_ms: float
    efficiency_pct: float
    other_microseconds: float
    layers: list[LayerEfficiency]


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(PEAK_WIDTH, PEAK_WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.reshape(-1, x[0].numel() // PEAK_WIDTH, PEAK_WIDTH)).amax(1)


def efficiency(model: Model, engine: str, progress: Progress = silent) -> Efficiency:
    """Times every layer on the engine, against a dense matrix product on the same engine and a copy in memory.

    Latency is Σ MACs / (peak × efficiency) over the layers, plus the operations that multiply nothing.

    Paper: Lavin, On the Efficiency of Convolutional Neural Networks, 2024, arXiv 2404.03617, sections 2 and 3.
    Differs: the peak is what a dense product reaches here, not what the processor's clock and units promise.

    Raises:
        EngineError: the engine can't take the model.
    """
    progress("measure the peak", 0, 0)
    dense = Model(
        name="a dense product",
        module=_Dense(),
        preprocess=Preprocess(size=(PEAK_SIDE, PEAK_SIDE)),
        num_classes=PEAK_WIDTH,
        origin={},
    )
    with tempfile.TemporaryDirectory() as folder:
        session, image = _open(dense, engine, Path(folder))
        products = [op for _ in range(TRIES) for op in session.profile(image, 1) if op.macs]
        peak = max(op.macs / op.microseconds for op in products)  # millions a second
    threads = session.threads
    bandwidth = bandwidth_bytes_per_s(threads) / 1e6  # bytes a microsecond
    traced = model.copy()
    pipeline.enter_(traced, Stage.GRAPH)
    with tempfile.TemporaryDirectory() as folder:
        progress("prepare the model", 0, 0)
        session, image = _open(traced, engine, Path(folder))
        call = latency.interleave({"call": lambda: session(image)}, min_seconds=2, max_seconds=20, progress=progress)
        ops = _account(session, image)
    layers = _layers(traced, ops, peak, bandwidth)
    latency_ms, macs = float(np.median(call["call"])), sum(layer["macs"] for layer in layers)
    return {
        "engine": engine,
        "threads": threads,
        "peak_gmacs_per_s": peak / 1e3,
        "bandwidth_gb_per_s": bandwidth / 1e3,
        "waterline_macs_per_byte": peak / bandwidth,
        "latency_ms": latency_ms,
        "operations_ms": sum(op.microseconds for op in ops) / 1e3,
        "efficiency_pct": 100 * macs / (peak * latency_ms * 1e3),
        "other_microseconds": sum(op.microseconds for op in ops if not op.macs),
        "layers": layers,
    }


def bandwidth_bytes_per_s(threads: int) -> float:
    """Of a copy in memory, what is read and what is written counted, the best of five."""
    source = torch.ones(COPIED_BYTES // FLOAT_BYTES)
    target, before, seconds = torch.empty_like(source), torch.get_num_threads(), list[float]()
    torch.set_num_threads(threads)
    try:
        for _ in range(6):
            start = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2 * COPIED_BYTES / min(seconds[1:])


def _open(model: Model, engine: str, folder: Path) -> tuple[Session, np.ndarray]:
    """A session for one image in float32, and an image."""
    from martlet import engine as engines
    from martlet.engine.torch import TorchSession

    image = np.random.default_rng(0).standard_normal((1, 3, *model.preprocess.size), dtype=np.float32)
    if engine == "torch":  # it runs the module, and no file
        from martlet.engine.base import cores

        return TorchSession(model, 1, "f32", cores()), image
    target = engines.get(engine)
    target.lower(model, folder)
    return target.open(folder, batch=1, precision="f32"), image


def _account(session: Session, image: np.ndarray) -> list[Op]:
    """Every operation, with its median time over several accounts, so that what else the machine does is left out."""
    times = defaultdict[tuple[str, str, str], list[float]](list)
    accounts = [session.profile(image, REPEATS) for _ in range(ACCOUNTS)]
    for op in itertools.chain.from_iterable(accounts):
        times[op.name, op.kind, op.precision].append(op.microseconds)
    return [replace(op, microseconds=float(np.median(times[op.name, op.kind, op.precision]))) for op in accounts[0]]


def _layers(traced: Model, ops: Sequence[Op], peak: float, bandwidth: float) -> list[LayerEfficiency]:
    """peak: MACs a microsecond. bandwidth: bytes a microsecond."""
    from martlet.graph.sites import parameter_name, sites
    from martlet.graph.trace import example_values

    graph = traced.module
    assert isinstance(graph, GraphModule)
    shapes = example_values(graph, traced.preprocess.size)
    bytes_of, kinds = dict[str, int](), dict[str, str]()
    for site in sites(graph):
        touched = [site.node, *site.node.all_input_nodes]
        bytes_of[site.name] = FLOAT_BYTES * sum(shapes[node].numel() for node in touched)
        weight = next((shapes[node] for node in site.node.all_input_nodes if parameter_name(node)), None)
        depthwise = site.kind == "conv" and weight is not None and weight[1] == 1 and weight[0] > 1
        kinds[site.name] = "depthwise" if depthwise else site.kind
    found: list[LayerEfficiency] = []
    for op in ops:
        if not op.macs:
            continue
        names = op.name.split(" + ")
        moved = sum(bytes_of.get(name, 0) for name in names)
        found.append(
            {
                "name": op.name,
                "kind": kinds.get(names[0], "product"),
                "macs": op.macs,
                "bytes": moved,
                "microseconds": op.microseconds,
                "efficiency_pct": 100 * op.macs / (peak * op.microseconds) if op.microseconds else 0.0,
                "attainable_pct": 100 * min(1.0, op.macs * bandwidth / (moved * peak)) if moved else 100.0,
            }
        )
    return found
