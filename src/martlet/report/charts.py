"""Where the marks of each chart stand, in per cent of its width or height. No drawing: the template draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from martlet.core.report import Document, Latency, Layer, OpTime

NUM_WORST = 6
NUM_TOP_OPS = 10


@dataclass(frozen=True)
class Axis:
    """Ticks from `low` to `high`, both included."""

    ticks: tuple[float, ...]

    @property
    def low(self) -> float:
        return self.ticks[0]

    @property
    def high(self) -> float:
        return self.ticks[-1]

    def at(self, value: float) -> float:
        """Where a value stands, in per cent of the axis, held inside it."""
        return round(100 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0), 3)


@dataclass(frozen=True)
class Interval:
    """A median and its 5–95 % interval. role: `baseline`, `alternative` or `artifact`."""

    name: str
    role: str
    latency: Latency
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Bar:
    """A layer's bar from zero. left, bottom, width, height: per cent of the plot."""

    index: int
    layer: Layer
    worst: bool
    left: float
    bottom: float
    width: float
    height: float


@dataclass(frozen=True)
class Rates:
    """Images per second at one batch size; None where it was not measured."""

    batch: int
    baseline: float | None
    artifact: float | None

    @property
    def best(self) -> float:
        return max(self.baseline or 0.0, self.artifact or 0.0)


@dataclass(frozen=True)
class OpGroup:
    """All operations of one kind and precision."""

    kind: str
    precision: str
    num: int
    microseconds: float


@dataclass(frozen=True)
class Segment:
    """A precision's part of a stacked bar."""

    precision: str
    kind: str
    pct: float


def axis(low: float, high: float, num: int = 5) -> Axis:
    """About `num` round steps that hold both ends and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = _step(low, high, num)
    first, last = math.floor(low / step + 1e-9), max(math.ceil(high / step - 1e-9), 1)
    return Axis(tuple(round(i * step, 12) for i in range(first, last + 1)))


def ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` round steps between two numbers, zero among them only if it lies there."""
    step = _step(low, high, num)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _step(low: float, high: float, num: int) -> float:
    rough = (high - low) / num or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))


def intervals(document: Document) -> tuple[Axis, list[Interval]]:
    """Latencies of the baseline, the alternatives and the artifact on one axis from zero, in ms."""
    entries = [
        ("baseline", "baseline", document["baseline"]["latency_ms"]),
        *((entry["name"], "alternative", entry["latency_ms"]) for entry in document["alternatives"]),
        ("artifact", "artifact", document["artifact"]["latency_ms"]),
    ]
    scale = axis(0, max(latency["p95"] for _, _, latency in entries))
    return scale, [
        Interval(name, role, latency, *(scale.at(latency[key]) for key in ("p05", "median", "p95")))
        for name, role, latency in entries
    ]


def layer_bars(layers: Sequence[Layer]) -> tuple[Axis, list[Bar]]:
    """A bar a layer in network order, the worst marked; infinite dB (exact) reaches the top, NaN the bottom."""
    levels = [layer["sqnr_db"] for layer in layers if layer["sqnr_db"] is not None and math.isfinite(layer["sqnr_db"])]
    scale = axis(min(levels, default=0.0), max(levels, default=0.0))
    worst = {id(layer) for layer in worst_layers(layers)}
    zero, slot = scale.at(0), 100 / max(len(layers), 1)
    bars = []
    for index, layer in enumerate(layers):
        if layer["sqnr_db"] is None:
            continue
        end = scale.at(max(_rank(layer), scale.low))
        bars.append(
            Bar(
                index=index,
                layer=layer,
                worst=id(layer) in worst,
                left=round((index + 0.1) * slot, 3),
                bottom=round(min(zero, end), 3),
                width=round(0.8 * slot, 3),
                height=round(max(abs(end - zero), 0.6), 3),  # a bar of 0 dB is still seen
            )
        )
    return scale, bars


def worst_layers(layers: Sequence[Layer], num: int = NUM_WORST) -> list[Layer]:
    """The layers with the lowest SQNR, NaN first."""
    return sorted((layer for layer in layers if layer["sqnr_db"] is not None), key=_rank)[:num]


def _rank(layer: Layer) -> float:
    return -math.inf if math.isnan(layer["sqnr_db"]) else layer["sqnr_db"]


def throughput(document: Document) -> list[Rates]:
    """Images per second of both sides at every batch size that either was measured at."""
    before, after = (
        {entry["batch"]: entry["images_per_s"] for entry in document[side]["throughput"]}
        for side in ("baseline", "artifact")
    )
    return [Rates(batch, before.get(batch), after.get(batch)) for batch in sorted(before | after)]


def slowest(ops: Sequence[OpTime]) -> list[OpTime]:
    """All operations, the slowest first."""
    return sorted(ops, key=lambda op: -op["microseconds"])


def op_groups(ops: Sequence[OpTime]) -> list[OpGroup]:
    """Operations summed by kind and precision, the most time first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for op in ops:
        groups.setdefault((op["kind"], op["precision"]), []).append(op["microseconds"])
    found = [OpGroup(*key, len(times), sum(times)) for key, times in groups.items()]
    return sorted(found, key=lambda group: -group.microseconds)


def segments(pct: Mapping[str, float]) -> list[Segment]:
    """The parts of a stacked bar: integers, then half precision, then full."""
    parts = [Segment(precision, precision_kind(precision), value) for precision, value in pct.items()]
    return sorted(parts, key=lambda s: (("int4", "int8", "half", "full", "other").index(s.kind), s.precision))


def precision_kind(precision: str) -> str:
    """The color class of a precision: `int4` (and fewer bits), `int8`, `half`, `full` or `other`."""
    name = precision.lower()
    if name in ("f16", "fp16", "bf16", "float16", "bfloat16"):
        return "half"
    if name in ("f32", "fp32", "float32"):
        return "full"
    bits = name.removeprefix("u").removeprefix("int").removeprefix("i")
    if bits != name and bits.isdigit() and int(bits) <= 8:
        return bits_kind(int(bits))
    return "other"


def bits_kind(bits: int) -> str:
    """The color class of a number of bits."""
    return "int4" if bits <= 4 else "int8" if bits <= 8 else "half" if bits <= 16 else "full"
