"""What methods that round weights alone share: Linear by Linear, on the inputs that the rounded ones before it give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.errors import NumericsError, RecipeError, UsageError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.functional.quantize.formats import IntegerGrid, fitting_group_size
from martlet.functional.quantize.gptq import RoundedWeight, effective_rows, gptq, input_hessian
from martlet.graph import rounding
from martlet.graph.sites import Site, aten, sites
from martlet.graph.trace import Walk
from martlet.nn.quantizers import PackedWeightQuantizer

MIRRORED = 4
"""The fewest bits of which one code can be spared."""
FEW_ROWS = 0.3  # decision 7: 0.45 for ViT-Ti's classifier, between two dampings that were tried, 0.3 and 0.5


@dataclass(frozen=True, kw_only=True)
class SequentialWeights(Technique):
    """Fields and order of work of every method that rounds the weights of Linears by second-order information.

    A method changes the float model exactly (`prepare_`), says how much each row of a Linear's input counts
    (`importance`), and may round a weight in a way of its own (`round`). Activations stay in floating point.

    Args:
        bits: of a weight, from 2 to 8. With 4 and more, codes are signed and mirror: the most negative one isn't used.
            Fewer are too few for that, and each scale has a zero point instead.
        group_size: neighbouring input features that share a scale, in each output feature; 0 is all of them. Where
            it doesn't divide a Linear's input features, the largest size below it that does is taken, if it is at
            least half of it; the record says how many Linears have which.
        activation_order: round the features with the largest inputs first.
        damping: what is added to the Hessian's diagonal, as a share of its mean; more where a Linear has seen few rows,
            as a classifier has, one an image: 0.3 times its input features for each row. With less, it makes up for
            errors on these rows alone, and errs more on others than if it had been rounded to nearest.
    """

    stage: ClassVar[Stage] = Stage.GRAPH
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    needs_images: ClassVar[bool] = True

    bits: int = 4
    group_size: int = 32
    activation_order: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"{self.name}: bits is {self.bits}; it can be 2 to 8")
        if self.group_size < 0:
            raise RecipeError(f"{self.name}: group_size is {self.group_size}; it can be 0, for a scale a row, or more")
        if not self.damping > 0:
            raise RecipeError(f"{self.name}: damping is {self.damping:g}; it has to be above 0, and 0.01 is usual")

    def check(self, model: Model) -> None:
        assert isinstance(model.module, GraphModule)
        found = linears(model.module)
        if not found:
            raise UsageError(f"{self.name}: {model.name} has no Linear whose weight could be quantized")
        for site in found:
            self._group_size(site.name, rounding.tensor(model.module, site.node.args[1]).shape[1])

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        graph_module = model.module
        assert isinstance(graph_module, GraphModule)
        images = torch.cat(list(context.calibration(self)))
        changed = self.prepare_(graph_module, context)
        found = linears(graph_module)
        importance = self.importance(graph_module, found, images, context)
        done: list[str] = []

        def quantize(site: Site, x: Tensor, weight: Tensor) -> PackedWeightQuantizer:
            context.progress("round weights", len(done), len(found))
            done.append(site.name)
            return self._quantize(site.name, x, weight, importance.get(site.node))

        walk = Sequential(graph_module, {site.node: site for site in found}, quantize)
        with torch.no_grad():
            walk.run(images)
        quantizers = [walk.quantizers[_parameter(site.node)] for site in found]
        placed = [(site.node, 1, quantizer) for site, quantizer in zip(found, quantizers, strict=True)]
        sizes = Counter(quantizer.group_size for quantizer in quantizers)
        return {
            "quantized": {"linear": len(found)},
            **changed,
            **({"weighted": len(importance)} if importance else {}),
            "group_sizes": {str(size): count for size, count in sorted(sizes.items())},
            "rounding": rounding.insert_(graph_module, {}, placed),
        }

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        rounding.restore_(model.module, record["rounding"])

    def prepare_(self, graph_module: GraphModule, context: Context) -> dict[str, Any]:
        """Changes the float model without changing its logits. Returns what the record should tell of it."""
        return {}

    def importance(
        self, graph_module: GraphModule, found: Sequence[Site], images: Tensor, context: Context
    ) -> Mapping[Node, Tensor]:
        """How much each row of a Linear's input counts, in its leading shape; rows of those left out count alike."""
        return {}

    def round(
        self, rows: Tensor, weight: Tensor, importance: Tensor | None, grid: IntegerGrid, group_size: int | None
    ) -> RoundedWeight:
        """A weight (O, I), rounded for rows (R, I) of importance (R)."""
        damping = max(self.damping, FEW_ROWS * weight.shape[1] / effective_rows(rows, importance))
        return gptq(weight, input_hessian(rows, importance), grid, group_size, damping, self.activation_order)

    def _quantize(self, name: str, x: Tensor, weight: Tensor, importance: Tensor | None) -> PackedWeightQuantizer:
        """A Linear's weight (O, I), rounded for inputs (…, I)."""
        width = self._group_size(name, weight.shape[1])
        flat = None if importance is None else importance.flatten()
        grid = IntegerGrid(self.bits, symmetric=self.bits >= MIRRORED)
        try:
            result = self.round(x.flatten(0, -2), weight, flat, grid, width if width < weight.shape[1] else None)
        except NumericsError as error:
            raise NumericsError(f"{self.name}: {name}: {error}") from error
        scale, zero_point = (part.clone() for part in result.parameters.unbind(-1))
        return PackedWeightQuantizer(result.codes, scale, self.bits, None if grid.symmetric else zero_point)

    def _group_size(self, name: str, inputs: int) -> int:
        """The largest size, up to the one asked for, that divides the inputs."""
        try:
            return fitting_group_size(inputs, self.group_size)
        except ValueError as error:
            raise RecipeError(f"{self.name}: {name} {error}") from None


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
