"""gptq: the weights of every Linear in a few bits, each column making up for the rounding of those before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.errors import NumericsError, RecipeError, UsageError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.functional.formats import IntegerGrid
from martlet.functional.gptq import gptq, input_hessian, round_to_nearest
from martlet.graph import rounding
from martlet.graph.sites import Site, aten, sites
from martlet.graph.trace import Walk
from martlet.nn.quantizers import PackedWeightQuantizer


@dataclass(frozen=True, kw_only=True)
class GPTQ(Technique):
    """Quantize the weights of every Linear to a few bits, so that its outputs on some images change least.

    For a small file: a weight of 4 bits with a scale for each 32 is 5 bits and not 32. Engines multiply it in floating
    point, so it is no faster than `bf16` where computing takes the time and not reading the weights, as in most vision
    models at batch 1. Convolutions, among them the one that makes the patches, and products with a constant matrix that
    are no Linear stay in floating point, and so do all activations. 4 and 8 bits are what engines have; other widths
    are simulated: packed in `weights.safetensors`, and in the engine's file the next wider of the two.

    Args:
        bits: of a weight, from 2 to 8. Codes are signed and mirror: the most negative one isn't used.
        group_size: neighbouring input features that share a scale, in each output feature; 0 is all of them. Where
            it doesn't divide a Linear's input features, the largest size below it that does is taken, if it is at
            least half of it; the record says how many Linears have which.
        activation_order: round the features with the largest inputs first.
        damping: what is added to the Hessian's diagonal, as a share of its mean.
        compensate: False rounds every weight to nearest (RTN) on the same kind of grid, to compare.

    Shape: none changes.
    Needs: images, without labels; 64 are enough for most models.
    Cost: one forward pass, with the activations of all images in memory, and for each Linear a Cholesky factorization
        of its input features; at run time, the weights' unpacking.
    Paper: Frantar et al., GPTQ, 2023, arXiv 2210.17323, algorithm 1; activation order is the official code's.
    Differs: sequential as in the paper, Linear by Linear on inputs that the rounded ones before it give; the official
        code does so block by block. A weight that several Linears share is rounded for the inputs of the first.
    Raises: RecipeError for a setting out of range, groups that divide no Linear's input features, or without images;
        UsageError if the model has no Linear; NumericsError for inputs that are NaN, or a damping too small.
    """

    name: ClassVar[str] = "gptq"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "weights of every Linear in 2 to 8 bits, activations in floating point"
    paper: ClassVar[str] = "Frantar et al., GPTQ, 2023, arXiv 2210.17323"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    needs_images: ClassVar[bool] = True

    bits: int = 4
    group_size: int = 32
    activation_order: bool = False
    damping: float = 0.01
    compensate: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"gptq: bits is {self.bits}; it can be 2 to 8")
        if self.group_size < 0:
            raise RecipeError(f"gptq: group_size is {self.group_size}; it can be 0, for a scale a row, or more")
        if not self.damping > 0:
            raise RecipeError(f"gptq: damping is {self.damping:g}; it has to be above 0, and 0.01 is usual")

    def check(self, model: Model) -> None:
        assert isinstance(model.module, GraphModule)
        found = linears(model.module)
        if not found:
            raise UsageError(f"gptq: {model.name} has no Linear whose weight could be quantized")
        for site in found:
            self._group_size(site.name, rounding.tensor(model.module, site.node.args[1]).shape[1])

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        graph_module = model.module
        assert isinstance(graph_module, GraphModule)
        found = linears(graph_module)
        images = torch.cat(list(context.calibration(self)))
        done: list[str] = []

        def quantize(site: Site, x: Tensor, weight: Tensor) -> PackedWeightQuantizer:
            context.progress("round weights", len(done), len(found))
            done.append(site.name)
            return self.quantize(site.name, x, weight)

        walk = Sequential(graph_module, {site.node: site for site in found}, quantize)
        with torch.no_grad():
            walk.run(images)
        quantizers = [walk.quantizers[_parameter(site.node)] for site in found]
        placed = [(site.node, 1, quantizer) for site, quantizer in zip(found, quantizers, strict=True)]
        sizes = Counter(quantizer.group_size for quantizer in quantizers)
        return {
            "quantized": {"linear": len(found)},
            "group_sizes": {str(size): count for size, count in sorted(sizes.items())},
            "rounding": rounding.insert_(graph_module, {}, placed),
        }

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        rounding.restore_(model.module, record["rounding"])

    def quantize(self, name: str, x: Tensor, weight: Tensor) -> PackedWeightQuantizer:
        """A Linear's weight (O, I), rounded for inputs (…, I)."""
        width = self._group_size(name, weight.shape[1])
        grid, group_size = IntegerGrid(self.bits), width if width < weight.shape[1] else None
        try:
            if self.compensate:
                hessian = input_hessian(x.flatten(0, -2))
                result = gptq(weight, hessian, grid, group_size, self.damping, self.activation_order)
            else:
                result = round_to_nearest(weight, grid, group_size)
        except NumericsError as error:
            raise NumericsError(f"gptq: {name}: {error}") from error
        return PackedWeightQuantizer(result.codes, result.parameters[..., 0].clone(), self.bits)

    def _group_size(self, name: str, inputs: int) -> int:
        """The largest size, up to the one asked for, that divides the inputs."""
        if self.group_size == 0 or self.group_size >= inputs:
            return inputs
        size = next(size for size in range(self.group_size, 0, -1) if inputs % size == 0)
        if 2 * size < self.group_size:
            raise RecipeError(
                f"gptq: {name} has {inputs} input features, which no groups of {(self.group_size + 1) // 2} to "
                f"{self.group_size} divide; choose another group_size, or 0 for one scale a row"
            )
        return size


class Sequential(Walk):
    """Runs a graph once; each Linear's weight is rounded when its input is there, and what follows sees it rounded.

    quantizers: by the name of the weight.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        found: Mapping[Node, Site],
        quantize: Callable[[Site, Tensor, Tensor], PackedWeightQuantizer],
    ) -> None:
        super().__init__(graph_module)
        self.found, self.quantize = found, quantize
        self.quantizers: dict[str, PackedWeightQuantizer] = {}

    def run_node(self, n: Node) -> object:
        if n not in self.found:
            return super().run_node(n)
        (x, weight, *bias), _ = self.fetch_args_kwargs_from_env(n)
        name = _parameter(n)
        if name not in self.quantizers:
            self.quantizers[name] = self.quantize(self.found[n], x, weight)
        return n.target(x, self.quantizers[name](), *bias)  # type: ignore[operator]


def linears(graph_module: GraphModule) -> list[Site]:
    """Every Linear with a weight of its own, in the order of execution."""
    found = (site for site in sites(graph_module) if site.node.target is aten.linear.default)
    return [site for site in found if isinstance(site.node.args[1], Node) and site.node.args[1].op == "get_attr"]


def _parameter(node: Node) -> str:
    parameter = node.args[1]
    assert isinstance(parameter, Node)
    return str(parameter.target)
