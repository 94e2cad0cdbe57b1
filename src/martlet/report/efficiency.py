"""A page that shows where a model's time goes: the efficiency gap and the waterline. No drawing: the template draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from martlet.report import charts, html, units

if TYPE_CHECKING:
    from martlet.measure.efficiency import Efficiency, LayerEfficiency


@dataclass(frozen=True)
class Block:
    """A layer's rectangle that stands on zero. left, width, height: per cent of the plot."""

    layer: LayerEfficiency
    left: float
    width: float
    height: float


def gap(found: Efficiency) -> tuple[charts.Axis, list[Block]]:
    """Efficiency over time: as wide as a layer takes long, as high as it is efficient, so that areas are MACs.

    The whole width is the latency, and what stays empty is what the machine could have multiplied besides.
    """
    layers, whole = found["layers"], max(1e3 * found["latency_ms"], 1e3 * found["operations_ms"])
    scale = charts.axis(0, max([100.0, *(layer["efficiency_pct"] for layer in layers)]))
    return scale, _side_by_side(
        layers, [layer["microseconds"] / whole for layer in layers], [scale.at(la["efficiency_pct"]) for la in layers]
    )


def waterline(found: Efficiency) -> tuple[charts.Axis, float, list[Block]]:
    """Operational intensity, in powers of two of MACs a byte, over the share of MACs; and the height of the line.

    What stands out of the water is bound by arithmetic; what stays under it, by memory.
    """
    layers, total = found["layers"], sum(layer["macs"] for layer in found["layers"]) or 1
    levels = [math.log2(1 + layer["macs"] / layer["bytes"]) if layer["bytes"] else 0.0 for layer in layers]
    line = math.log2(1 + found["waterline_macs_per_byte"])
    scale = charts.axis(0, max([line, *levels]))
    shares = [layer["macs"] / total for layer in layers]
    return scale, scale.at(line), _side_by_side(layers, shares, [scale.at(level) for level in levels])


def render(name: str, found: Efficiency) -> str:
    """The page, which asks for nothing outside itself."""
    return html.template("efficiency.html.j2").render(
        name=name,
        d=found,
        css=(html.HERE / "page.css").read_text(encoding="utf-8"),
        units=units,
        gap=gap(found),
        waterline=waterline(found),
    )


def write(name: str, found: Efficiency, path: Path) -> None:
    """Writes the page beside `path`, then renames.

    Raises:
        ArtifactError: the folder is missing, full or not ours.
    """
    html.write_page(render(name, found), path)


def _side_by_side(layers: Sequence[LayerEfficiency], shares: Sequence[float], heights: Sequence[float]) -> list[Block]:
    blocks, left = list[Block](), 0.0
    for layer, share, height in zip(layers, shares, heights, strict=True):
        blocks.append(Block(layer, round(100 * left, 3), round(100 * share, 3), height))
        left += share
    return blocks
