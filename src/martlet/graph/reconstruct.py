"""Learns how weights round, and scales of activations, block by block, so that each block gives what it gave in float.

Source: Li et al., BRECQ, 2021, arXiv 2102.05426 (blocks); Nagel et al., AdaRound, 2020, arXiv 2004.10568 (weights); Wei
et al., QDrop, 2022, arXiv 2203.05740 (a block's input is the rounded one, of which some numbers are the float ones).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.core.kept import Kept, digest
from martlet.core.technique import Progress
from martlet.functional.quantize.adaround import (
    annealed_beta,
    drop_quantization,
    initial_rounding,
    learned_codes,
    rounding_regularizer,
    soft_weight,
)
from martlet.functional.quantize.lsq import round_with_step
from martlet.functional.quantize.packing import pack
from martlet.graph.objectives import Block, Loss
from martlet.graph.segments import blocks, extract
from martlet.nn.quantizers import ActivationQuantizer, PackedWeightQuantizer, TableQuantizer
from martlet.nn.straight_through import LearnedScale, Passing

BATCH = 8
"""Images in a step. On CPU cores a step's time grows with them."""
FREEDOMS = ("rounding", "weights", "all")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax}


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How a block learns.

    steps: of an optimizer, one of OPTIMIZERS, on BATCH images each. freedom: one of FREEDOMS: with `rounding` a weight
    goes up or down from where it is, with `weights` it goes anywhere, with `all` the steps of its grid are learned too.
    weight_rate, scale_rate, float_rate: learning rates of weights, in steps of their grid; of scales of activations and
    steps of weights; and of what isn't rounded (biases, norms, other weights), where 0 leaves it; the latter two are
    relative to what they change and fall to zero along a cosine. drop: the share of a block's input that is float.
    decide: the weight of the regularizer that drives each weight to one side, against a loss that starts at 1.
    """

    steps: int = 300
    freedom: str = "rounding"
    optimizer: str = "adam"
    weight_rate: float = 1e-2
    scale_rate: float = 1e-3
    float_rate: float = 0.0
    drop: float = 0.5
    decide: float = 1.0


def reconstruct_(
    rounded: GraphModule,
    original: GraphModule,
    images: Tensor,
    objective: Callable[[Block], Loss],
    learning: Learning,
    seed: int,
    progress: Progress,
    weights: GraphModule | None = None,
    kept: Kept | None = None,
) -> list[dict[str, float]]:
    """Learns all blocks in their order, each on the output of those before it. Returns its loss before and after.

    original: the same graph before it was rounded, with the same node names. weights: the same with the weights that
    were rounded, where these aren't the original's. kept: where each block is saved when it is done. The loss before
    and after is relative to the float output: mean squared error over mean square.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes = {node.name: node for node in rounded.graph.nodes}
    pieces = blocks(original)
    last = pieces[-1].output
    exact = approximate = images
    report: list[dict[str, float]] = []
    key = ""
    if kept is not None:
        graphs = (original, rounded, *([weights] if weights is not None else []))
        state = [images, *(tensor for graph in graphs for tensor in graph.state_dict().values())]
        key = "reconstruct-" + digest([*state, repr(learning), objective.__name__, str(seed)])
        if (found := kept.load(key)) is not None:
            tensors, report = found
            generator.set_state(tensors.pop("generator"))
            rounded.load_state_dict(tensors)
    for i, piece in enumerate(pieces):
        progress("reconstruct", i, len(pieces))
        before = extract(original, piece.input, piece.output)
        now = extract(rounded, nodes[piece.input.name], nodes[piece.output.name])
        rest = None if piece.output is last else extract(original, piece.output, last)
        target = _run(before, exact)
        if i < len(report):
            exact, approximate = target, _run(now, approximate)
            continue
        block = Block(rest, target, lambda now=now, x=approximate: _run(now, x), learning.steps)
        start = _relative(_run(now, approximate), target)
        learner = _Learner(now, weights or original, learning.freedom)
        if learner.weights or learner.scales:
            learner.learn_(exact, approximate, target, objective(block), learning, generator)
        exact, approximate = target, _run(now, approximate)
        report.append({"before": start, "after": _relative(approximate, target)})
        if kept is not None:
            kept.save(key, {**rounded.state_dict(), "generator": generator.get_state()}, report)
    progress("reconstruct", len(pieces), len(pieces))
    return report


class _LearnedWeight(nn.Module):
    """A weight's rows (O, I), and of each of its numbers the grid and what is learned."""

    v: nn.Parameter

    def __init__(self, quantizer: PackedWeightQuantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.rows = quantizer.flatten(weight.detach())
        self.scale = quantizer.scale.repeat_interleave(quantizer.group_size, 1)
        half = torch.full_like(quantizer.scale, 2 ** (quantizer.bits - 1))
        zero = half if quantizer.zero_point is None else quantizer.zero_point.to(half.dtype)
        self.zero = zero.repeat_interleave(quantizer.group_size, 1)

    def codes(self) -> Tensor:
        """What is stored, (O, I)."""
        raise NotImplementedError

    def finish_(self) -> None:
        self.quantizer.codes.copy_(pack(self.codes().to(torch.uint8), self.quantizer.bits))


class _SoftWeight(_LearnedWeight):
    """A weight between two codes, each of its numbers by itself."""

    def __init__(self, quantizer: PackedWeightQuantizer, weight: Tensor) -> None:
        super().__init__(quantizer, weight)
        self.v = nn.Parameter(initial_rounding(self.rows, self.scale))

    def codes(self) -> Tensor:
        return learned_codes(self.rows, self.v.detach(), self.scale, self.zero, self.quantizer.bits)

    def forward(self) -> Tensor:
        soft = soft_weight(self.rows, self.v, self.scale, self.zero, self.quantizer.bits)
        return self.quantizer.unflatten(soft)


class _FreeWeight(_LearnedWeight):
    """A weight that moves in steps of its grid, with a gradient as if it weren't rounded."""

    def __init__(self, quantizer: PackedWeightQuantizer, weight: Tensor) -> None:
        super().__init__(quantizer, weight)
        self.position = self.rows / self.scale
        self.v = nn.Parameter(torch.zeros_like(self.position))

    def codes(self) -> Tensor:
        return (torch.round(self.position + self.v.detach()) + self.zero).clamp(0, 2**self.quantizer.bits - 1)

    def forward(self) -> Tensor:
        rounded = self.codes() - self.zero
        return self.quantizer.unflatten((self.v + (rounded - self.v.detach())) * self.scale)


class _WholeWeight(_LearnedWeight):
    """A weight that moves, and the steps of its grid with it (Chen et al., EfficientQAT, 2025, arXiv 2407.11062)."""

    def __init__(self, quantizer: PackedWeightQuantizer, weight: Tensor) -> None:
        super().__init__(quantizer, weight)
        self.position = self.rows / self.scale
        self.v = nn.Parameter(torch.zeros_like(self.position))
        self.factor = nn.Parameter(torch.ones_like(quantizer.scale))

    def _wide(self) -> Tensor:
        return self.scale * self.factor.repeat_interleave(self.quantizer.group_size, 1)

    def codes(self) -> Tensor:
        ratio = (self.position + self.v.detach()) * self.scale / self._wide().detach()
        return (ratio.round() + self.zero).clamp(0, 2**self.quantizer.bits - 1)

    def forward(self) -> Tensor:
        low, high = -self.zero, 2**self.quantizer.bits - 1 - self.zero
        rows = (self.position + self.v) * self.scale
        return self.quantizer.unflatten(round_with_step(rows, self._wide(), low, high))

    def finish_(self) -> None:
        super().finish_()
        self.quantizer.scale.mul_(self.factor.detach())


KINDS = {"rounding": _SoftWeight, "weights": _FreeWeight, "all": _WholeWeight}


class _Learner:
    """A block whose quantizers have parameters while it learns."""

    def __init__(self, module: GraphModule, weights: GraphModule, freedom: str) -> None:
        self.module = module
        self.weights: dict[str, _LearnedWeight] = {}
        self.scales: dict[str, LearnedScale] = {}
        self.passing: dict[str, Passing] = {}
        self.floats = list(module.parameters())
        kind = KINDS[freedom]
        for node in module.graph.nodes:
            if node.op != "call_module":
                continue
            name = str(node.target)
            quantizer = module.get_submodule(name)
            if isinstance(quantizer, PackedWeightQuantizer):
                owner, _, leaf = name.removesuffix("_quantizer").rpartition(".")
                self.weights[name] = kind(quantizer, getattr(weights.get_submodule(owner), leaf))
            elif isinstance(quantizer, ActivationQuantizer):
                self.passing[name] = Passing(quantizer)
            elif isinstance(quantizer, TableQuantizer):
                self.scales[name] = LearnedScale(quantizer)

    def learn_(
        self, exact: Tensor, rounded: Tensor, target: Tensor, loss: Loss, learning: Learning, generator: torch.Generator
    ) -> None:
        """exact, rounded: the block's input (B, …) in the float model and behind rounded blocks. target: its output."""
        learned = {**self.weights, **self.scales, **self.passing}
        for name, layer in learned.items():
            self.module.set_submodule(name, layer)
        optimizer = OPTIMIZERS[learning.optimizer]
        weights = optimizer([w.v for w in self.weights.values()] or [torch.zeros(1)], lr=learning.weight_rate)
        steps = [w for w in self.weights.values() if isinstance(w, _WholeWeight)]
        rates = [{"params": [s.factor], "lr": learning.scale_rate} for s in (*self.scales.values(), *steps)]
        if learning.float_rate:
            for parameter in self.floats:
                parameter.requires_grad_(True)
                typical = float(parameter.detach().abs().mean())
                rates.append({"params": [parameter], "lr": learning.float_rate * typical})
        others = optimizer(rates or [torch.zeros(1)], lr=learning.scale_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(others, learning.steps)
        soft = [w for w in self.weights.values() if isinstance(w, _SoftWeight)]
        count = sum(w.v.numel() for w in soft)
        first: Tensor | None = None
        for step in range(learning.steps):
            chosen = torch.randperm(len(rounded), generator=generator)[:BATCH]
            x = drop_quantization(rounded[chosen], exact[chosen], learning.drop, generator)
            error = loss(self.module(x) - target[chosen], chosen)
            first = error.detach() if first is None else first
            total = error / first
            beta = annealed_beta(step, learning.steps)
            if beta is not None and soft:
                undecided = sum(rounding_regularizer(w.v, beta) for w in soft)
                total = total + learning.decide * undecided / count
            weights.zero_grad()
            others.zero_grad()
            total.backward()
            weights.step()
            others.step()
            schedule.step()
        with torch.no_grad():
            for name, layer in learned.items():
                layer.finish_()
                self.module.set_submodule(name, layer.quantizer)
        for parameter in self.floats:
            parameter.requires_grad_(False)


def _run(module: GraphModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(part) for part in x.split(BATCH)])


def _relative(value: Tensor, target: Tensor) -> float:
    return float((value - target).square().mean() / target.square().mean())
