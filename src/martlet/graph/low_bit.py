"""What the methods for few bits share: one order of work, in which each says only what is its own.

A method changes the float model exactly (`prepare_`), chooses a grid for each tensor (`activation`, `weight`, or
`decide` for both at once). With steps, rounding and scales are then learned block by block (`objective`).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.errors import NumericsError, RecipeError, UsageError
from martlet.core.facts import Fact
from martlet.core.kept import digest
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique, leave_out
from martlet.functional.quantize.formats import IntegerGrid
from martlet.functional.quantize.logarithmic import LogarithmicGrid
from martlet.functional.quantize.percentile import QUANTILES, percentile_affine, percentile_grids, percentile_scales
from martlet.functional.quantize.reparameterize import ChannelChange, reparameterize_scales
from martlet.functional.quantize.search import AffineGrid, best_grid, squared_error
from martlet.functional.quantize.table import Quantizes, Table, tabulate
from martlet.graph import rounding
from martlet.graph.allocation import ALLOCATIONS, BUDGETS, allocate_bits
from martlet.graph.fit import Call, Fit, Fitted, Operand, TensorKind, fit, remembered
from martlet.graph.objectives import OBJECTIVES
from martlet.graph.reconstruct import FREEDOMS, OPTIMIZERS, Learning, reconstruct_
from martlet.graph.rewrite.reparameterize import reparameterize_
from martlet.graph.sites import Site, sites
from martlet.nn.quantizers import (
    ActivationQuantizer,
    PackedWeightQuantizer,
    Quantizer,
    TableQuantizer,
    WeightQuantizer,
)

FIT_IMAGES = 32
"""How many calibration images grids are chosen on: what the papers take."""
IMAGE_BITS = 8
"""An image has 8 bits to begin with; the methods' official codes leave its rounding there too."""
ROWS = 1024
"""How many rows of a tensor a search that rounds it again and again looks at."""


@dataclass(frozen=True, kw_only=True)
class LowBit(Technique):
    """Fields and order of work of every method that rounds weights and activations to few bits.

    Rounds the weight of every Linear and convolution, its input, and q, k, v and the softmax's output of every
    attention. LayerNorm, softmax, GELU and residual additions are computed in floating point.

    Args:
        weight_bits: of Linears and convolutions, from 2 to 8.
        activation_bits: of their inputs, and of q, k, v and softmax, from 2 to 8; an image keeps 8.
        steps: in which each block learns how its weights round and its activations scale, on all calibration images
            (AdaRound, LSQ, QDrop); 0 leaves everything as it was chosen.
        objective: what a block keeps small: `mse`, `perturbation` (APHQ-ViT) or `fisher` (FIMA-Q).
        freedom: what is learned of a weight: `rounding`, whether it goes up or down; `weights`, where it goes; `all`,
            that and the steps of its grid.
        optimizer: of what is learned: `adam` or `adamax`.
        allocation: `equal`, the same bits everywhere; else bits for each multiplication, judged by the squared error of
            the logits to first order (`greedy`, or `milp`, exactly) or by LRP-QViT's `relevance`, exactly.
        budget: what allocated bits may not use more of than equal bits: `size`, the bits of all weights, activations
            keeping theirs; `bitops`, MACs times the bits of both operands; `average`, neither.
    """

    stage: ClassVar[Stage] = Stage.GRAPH
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS, Fact.UNFUSED})
    needs_images: ClassVar[bool] = True
    rounded_inputs: ClassVar[bool] = True
    """Grids are chosen on tensors that come from rounded ones, as they will be."""

    weight_bits: int = 4
    activation_bits: int = 4
    steps: int = 0
    objective: str = "mse"
    freedom: str = "rounding"
    optimizer: str = "adam"
    allocation: str = "equal"
    budget: str = "average"

    def __post_init__(self) -> None:
        choices = {
            "objective": OBJECTIVES,
            "freedom": FREEDOMS,
            "optimizer": OPTIMIZERS,
            "allocation": ("equal", *ALLOCATIONS),
            "budget": BUDGETS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"{self.name}: {name} is {getattr(self, name)!r}; it can be {', '.join(known)}")
        if self.steps < 0:
            raise RecipeError(f"{self.name}: steps is {self.steps}; it can be 0, to learn nothing, or more")
        for name in ("weight_bits", "activation_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise RecipeError(f"{self.name}: {name} is {getattr(self, name)}; it can be 2 to 8")

    def check(self, model: Model) -> None:
        assert isinstance(model.module, GraphModule)
        if not any(True for _ in sites(model.module)):
            raise UsageError(f"{self.name}: {model.name} has no Linear, convolution or attention product to quantize")

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        graph_module = model.module
        assert isinstance(graph_module, GraphModule)
        graph_module.requires_grad_(False)
        batches = context.calibration(self)
        images = torch.cat(list(batches))
        few = spread(images, FIT_IMAGES)
        changed = self.prepare_(graph_module, few, context)
        if len(few) < FIT_IMAGES:
            changed = leave_out(changed, f"{FIT_IMAGES} calibration images are usual, and there are {len(few)}")
        original = copy.deepcopy(graph_module) if self.steps else None
        found = [site for site in sites(graph_module) if self.rounds(site)]
        bits = self._allocate(graph_module, found, few, context)
        if bits:
            changed["bits"] = {site.name: list(bits[site.node]) for site in found if site.node in bits}
        decide = self._decide_by_bits(graph_module, bits, few, context)
        if context.kept is not None:
            key = digest([few, *graph_module.state_dict().values(), repr(self), repr(changed), str(context.seed)])
            decide = remembered(decide, context.kept, f"grids-{key}")
        fitted = fit(graph_module, found, few, decide, self.rounded_inputs, context.progress)
        counts = {kind: sum(site.kind == kind for site in found) for kind in sorted({site.kind for site in found})}
        rounded = self.round_(graph_module, original, fitted, images, context)
        return {"quantized": counts, **changed, **rounded}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        assert isinstance(model.module, GraphModule)
        rounding.restore_(model.module, record["rounding"])

    def prepare_(self, graph_module: GraphModule, images: Tensor, context: Context) -> dict[str, Any]:
        """Changes the float model without changing its logits. Returns what the record should tell of it."""
        return {}

    def rounds(self, site: Site) -> bool:
        """Whether a multiplication is rounded at all."""
        return True

    def decider(self, graph_module: GraphModule, images: Tensor, context: Context) -> Callable[[Call], Fitted]:
        """What decides: `decide`, or that with what a method has to know of the whole model first."""
        return self.decide

    def decide(self, call: Call) -> Fitted:
        """How one multiplication's operands are rounded. None of them is constant, NaN or infinite."""
        operands = {position: self.activation(operand) for position, operand in call.operands.items()}
        return Fitted(operands, None if call.weight is None else self.weight(call))

    @abstractmethod
    def activation(self, operand: Operand) -> Quantizer:
        """The grid of one activation."""

    def weight(self, call: Call) -> Quantizer:
        """The grid of one weight, and its rounding. Without more: the least squared error, a grid for each row."""
        return quantized_weight(call, self.weight_bits, IntegerGrid(self.weight_bits, symmetric=False, least=0.5).fit)

    def bits(self, kind: TensorKind) -> int:
        """Of an activation."""
        return IMAGE_BITS if kind == "image" else self.activation_bits

    def round_(
        self, graph_module: GraphModule, original: GraphModule | None, fitted: Fit, images: Tensor, context: Context
    ) -> dict[str, Any]:
        """Inserts what was decided, and learns if there is the original to learn from. Returns a record of it."""
        record = {"rounding": rounding.insert_(graph_module, fitted.activations, fitted.weights)}
        if original is None:
            return record
        return {"blocks": self.learn_(graph_module, original, images, context), **record}

    def learning(self) -> Learning:
        """How a block learns."""
        return Learning(steps=self.steps, freedom=self.freedom, optimizer=self.optimizer)

    def learn_(
        self,
        graph_module: GraphModule,
        original: GraphModule,
        images: Tensor,
        context: Context,
        weights: GraphModule | None = None,
    ) -> list[dict[str, float]]:
        """Learns block by block, as `reconstruct_` says. Returns each block's error before and after."""
        objective, learning = OBJECTIVES[self.objective], self.learning()
        return reconstruct_(
            graph_module, original, images, objective, learning, context.seed, context.progress, weights, context.kept
        )

    def _allocate(
        self, graph_module: GraphModule, found: Sequence[Site], images: Tensor, context: Context
    ) -> dict[Node, tuple[int, int]]:
        """Bits of weight and activations where they aren't the fields'. Judged on grids that are found fast."""
        if self.allocation == "equal":
            return {}

        def rounded(call: Call, bits: int) -> Fitted:
            def ask(varying: Call) -> Fitted:
                grids = {
                    p: percentile_quantizer(o, IMAGE_BITS if o.kind == "image" else bits)
                    for p, o in varying.operands.items()
                }
                return Fitted(grids, None if call.weight is None else percentile_weight(call, bits))

            return self._decide(call, ask)

        return allocate_bits(
            graph_module,
            found,
            images,
            self.weight_bits,
            self.activation_bits,
            self.allocation,
            self.budget,
            rounded,
            context.seed,
            context.progress,
        )

    def _decide_by_bits(
        self, graph_module: GraphModule, bits: Mapping[Node, tuple[int, int]], images: Tensor, context: Context
    ) -> Callable[[Call], Fitted]:
        """Each call decided by this method with the call's bits."""
        methods: dict[tuple[int, int], tuple[LowBit, Callable[[Call], Fitted]]] = {}

        def decide(call: Call) -> Fitted:
            pair = bits.get(call.site.node, (self.weight_bits, self.activation_bits))
            if pair not in methods:
                method = replace(self, weight_bits=pair[0], activation_bits=pair[1])
                methods[pair] = method, method.decider(graph_module, images, context)
            method, ask = methods[pair]
            return method._decide(call, ask)

        return decide

    def _decide(self, call: Call, ask: Callable[[Call], Fitted]) -> Fitted:
        """Asks about all operands but those of one value, which every grid through it represents.

        Raises:
            NumericsError: an operand is NaN or infinite.
        """
        constants: dict[int, Quantizer] = {}
        for position, operand in call.operands.items():
            if not bool(torch.isfinite(operand.value).all()):
                raise NumericsError(f"{self.name}: an input of {call.site.name} is NaN or infinite")
            low, high = (float(v) for v in torch.aminmax(operand.value))
            if low == high:
                constants[position] = affine(AffineGrid(self.bits(operand.kind), abs(low) or 1.0, int(low < 0)))
        varying = {position: operand for position, operand in call.operands.items() if position not in constants}
        fitted = ask(replace(call, operands=varying))
        return Fitted({**constants, **fitted.operands}, fitted.weight)


class Reparameterized(LowBit):
    """A method that first changes LayerNorms and the Linears that read them."""

    def prepare_(self, graph_module: GraphModule, images: Tensor, context: Context) -> dict[str, Any]:
        found: dict[str, Any] = dict(reparameterize_(graph_module, images, self.change))
        nothing = "no LayerNorm is read by Linears alone, with a bias each, so none was re-parameterized"
        return found if found["reparameterized"] else leave_out(found, nothing)

    def change(self, rows: Tensor, weights: Sequence[Tensor]) -> ChannelChange:
        """The change of a LayerNorm's output (R, C), which weights (O, C) read. RepQ-ViT's: to the mean grid."""
        return reparameterize_scales(*percentile_scales(rows.T, self.activation_bits))


class PercentileGrids(Reparameterized):
    """The grids of Li et al., RepQ-ViT, 2023, arXiv 2212.08254: ranges by percentiles, log√2 for a softmax."""

    def activation(self, operand: Operand) -> Quantizer:
        return percentile_quantizer(operand, self.bits(operand.kind))

    def weight(self, call: Call) -> Quantizer:
        return percentile_weight(call, self.weight_bits)


def percentile_quantizer(operand: Operand, bits: int) -> Quantizer:
    """RepQ-ViT's grid of an activation."""
    x = operand.value
    if operand.kind == "softmax":
        tops = torch.quantile(x.flatten()[:: max(1, x.numel() // 2**20)], torch.tensor(QUANTILES))
        return tabulated(best_grid(squared_error(x), x, [LogarithmicGrid(bits, top, 1, 2) for top in tops]))
    return affine(percentile_affine(x, bits))


def percentile_weight(call: Call, bits: int) -> Quantizer:
    """RepQ-ViT's grids of a weight."""
    return quantized_weight(call, bits, lambda rows: percentile_grids(rows, bits))


def affine(grid: AffineGrid) -> Quantizer:
    """One uniform grid for a tensor; with 8 bits, in the form that engines have kernels for."""
    scale = torch.tensor(grid.scale)
    if grid.bits == 8:
        return ActivationQuantizer(scale, torch.tensor(grid.zero_point, dtype=torch.uint8))
    return TableQuantizer(grid.bits, scale, torch.tensor(float(grid.zero_point)))


def affine_heads(grids: list[AffineGrid], axis: int = 1) -> TableQuantizer:
    """A uniform grid for each slice along `axis`."""
    scale = torch.tensor([grid.scale for grid in grids])
    return TableQuantizer(grids[0].bits, scale, torch.tensor([float(grid.zero_point) for grid in grids]), axis)


def tabulated(grid: Quantizes) -> TableQuantizer:
    """Any grid, as a table whose largest value is 1, and its scale."""
    table = tabulate(grid)
    scale = table.values.abs().max()
    unit = Table(table.edges / scale, table.values / scale)
    return TableQuantizer(grid.bits, scale, torch.zeros(()), table=unit)


def quantized_weight(call: Call, bits: int, fit: Callable[[Tensor], Tensor], symmetric: bool = False) -> Quantizer:
    """A weight rounded to nearest; 8 bits in the form that engines multiply.

    fit: a scale and a zero point (O, 2) for each row (O, I), which is an output channel's; not asked with 8 bits.
    """
    assert call.weight is not None
    weight, axis = call.weight.detach(), call.site.output_axis
    if bits == 8:
        return WeightQuantizer.fit(weight, axis)
    rows = weight.movedim(axis, 0).flatten(1)  # (O, I)
    parameters = fit(rows)
    codes = IntegerGrid(bits, symmetric).quantize(rows, parameters)
    zero = None if symmetric else parameters[:, 1:]
    return PackedWeightQuantizer(codes, parameters[:, :1].clone(), bits, zero, weight.shape, axis)


def spread(images: Tensor, n: int) -> Tensor:
    """So many of images (B, …), evenly spaced, which are of all classes if they come in order: the same each time."""
    return images[:: max(1, len(images) // n)][:n]


def sample(x: Tensor, rows: int = ROWS) -> Tensor:
    """Evenly spaced rows of a tensor (…, C), (rows, C) or fewer: the same ones each time."""
    flat = x.flatten(0, -2)
    return flat[:: max(1, len(flat) // rows)]
