"""weight_only: weights in a format of 4 or 8 bits, each rounded to the nearest; activations stay as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.errors import NumericsError, RecipeError, UsageError, nearest
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Choices, Context, Stage, Technique
from martlet.functional.quantize.formats import FLOAT8, TABLES, IntegerGrid, TableGrid, fitting_group_size, table
from martlet.functional.quantize.gptq import round_to_nearest
from martlet.graph import rounding
from martlet.graph.sites import Site, sites
from martlet.nn.quantizers import PackedWeightQuantizer, Quantizer, WeightQuantizer

INTEGERS = {"int4": 4, "int8": 8}
FORMATS = (*INTEGERS, *TABLES, *FLOAT8)
LEAST = 0.5
"""Of a group's range, the least that a scale may be chosen to cover."""


@dataclass(frozen=True, kw_only=True)
class WeightOnly(Technique):
    """Quantize the weights of every Linear and convolution to a number format, from the weights alone.

    For a small file, without any image. Engines multiply in floating point, so it is no faster than `bf16` where
    computing takes the time and not reading the weights, as in most vision models at batch 1. Linears have kernels
    that read int4 and int8 (OpenVINO and ONNX Runtime) or nf4 (OpenVINO); all else becomes floating point again when
    the file is opened. `gptq` loses less at 4 bits or fewer, and needs images.

    Args:
        format: `int4`; `nf4`, 16 values that a normal distribution fills evenly; `power_of_two`, 0 and ±2^0 to ±2^-6,
            by which hardware multiplies with a shift; `int8`; `fp8_e4m3` or `fp8_e5m2`.
        group_size: neighbouring inputs that share a scale, in each output channel, in formats of 4 bits; 0 is all of
            them. Where it doesn't divide a row, the largest size below it that does is taken, if it is at least half
            of it; the record says how many weights have which. Formats of 8 bits have one scale a row.

    Shape: none changes.
    Needs: nothing.
    Cost: for each weight, fifty roundings, or one to an 8-bit float; at run time, its unpacking.
    Paper: Dettmers et al., QLoRA, 2023, arXiv 2305.14314, section 3 (nf4); Zhou et al., INQ, 2017, arXiv 1702.03044,
        section 2.1 (power_of_two); Micikevicius et al., 2022, arXiv 2209.05433 (8-bit floats).
    Differs: but for 8-bit floats a scale covers that share of a group's greatest magnitude, from one half to all of
        it, which gives the least squared error; QLoRA's covers all of it, in groups of 64 whose scales are rounded
        too. A power of two keeps its group's scale in floating point, and nothing is retrained, unlike in INQ.
    Raises: RecipeError for an unknown format, or groups that don't divide a weight's row; UsageError if the model has
        no Linear or convolution; NumericsError for a weight that is NaN.
    """

    name: ClassVar[str] = "weight_only"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "weights in int4, nf4, powers of two, int8 or 8-bit floats; activations as they are"
    paper: ClassVar[str] = "Dettmers et al., QLoRA, 2023, arXiv 2305.14314"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.UNFUSED})

    format: str = "int4"
    group_size: int = 32

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise RecipeError(f"weight_only: no format {self.format!r}{nearest(self.format, FORMATS)} (known: {known})")
        if self.group_size < 0:
            raise RecipeError(f"weight_only: group_size is {self.group_size}; it can be 0, for a scale a row, or more")

    def space(self) -> Choices:
        return Choices(settings={"format": ("int8", "int4")})

    def check(self, model: Model) -> None:
        graph_module = model.module
        assert isinstance(graph_module, GraphModule)
        found = weighted(graph_module)
        if not found:
            raise UsageError(f"weight_only: {model.name} has no Linear or convolution whose weight could be quantized")
        for site, parameter in found:
            self._group_size(site, rounding.tensor(graph_module, parameter))

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        graph_module = model.module
        assert isinstance(graph_module, GraphModule)
        found = weighted(graph_module)
        quantizers: dict[str, Quantizer] = {}  # by the weight's name: Linears may share one
        placed: list[tuple[Node, int, Quantizer]] = []
        for done, (site, parameter) in enumerate(found):
            context.progress("round weights", done, len(found))
            name = str(parameter.target)
            if name not in quantizers:
                quantizers[name] = self.quantize(site, rounding.tensor(graph_module, parameter).detach())
            assert site.weight is not None
            placed.append((site.node, site.weight, quantizers[name]))
        sizes = Counter(q.group_size for q in quantizers.values() if isinstance(q, PackedWeightQuantizer))
        return {
            "quantized": dict(sorted(Counter(site.kind for site, _ in found).items())),
            "group_sizes": {str(size): count for size, count in sorted(sizes.items())},
            "rounding": rounding.insert_(graph_module, {}, placed),
        }

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        rounding.restore_(model.module, record["rounding"])

    def quantize(self, site: Site, weight: Tensor) -> Quantizer:
        """A weight, rounded to nearest."""
        if not bool(torch.isfinite(weight).all()):
            raise NumericsError(f"weight_only: the weight of {site.name} is NaN or infinite")
        axis = site.output_axis
        if self.format in FLOAT8:
            return WeightQuantizer.fit_float8(weight, self.format, axis)
        bits, its = INTEGERS.get(self.format, 4), self.format if self.format in TABLES else None
        grid = IntegerGrid(bits, least=LEAST) if its is None else TableGrid(table(its), LEAST)
        rows = weight.movedim(axis, 0).flatten(1)  # (O, I)
        found = round_to_nearest(rows, grid, self._group_size(site, weight))
        scale = found.parameters[..., 0].clone()  # (O, groups)
        return PackedWeightQuantizer(found.codes, scale, bits, shape=weight.shape, axis=axis, format=its)

    def _group_size(self, site: Site, weight: Tensor) -> int:
        columns = weight.numel() // weight.shape[site.output_axis]
        if self.format == "int8" or self.format in FLOAT8:
            return columns  # one scale a row
        try:
            return fitting_group_size(columns, self.group_size)
        except ValueError as error:
            raise RecipeError(f"weight_only: {site.name} {error}") from None


def weighted(graph_module: GraphModule) -> list[tuple[Site, Node]]:
    """Every multiplication by a weight of its own, in the order of execution, and the node of the weight."""
    found = []
    for site in sites(graph_module):
        parameter = None if site.weight is None else site.node.args[site.weight]
        if isinstance(parameter, Node) and parameter.op == "get_attr":
            found.append((site, parameter))
    return found
