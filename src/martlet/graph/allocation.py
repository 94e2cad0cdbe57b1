"""Bits for each multiplication: its error with fewer and more of them, seen in the logits, under one budget for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.technique import Progress
from martlet.functional.allocation import Choice, allocate_exactly, allocate_greedily
from martlet.graph.fit import Call, Fitted, fit
from martlet.graph.sensitivity import output_gradients, sample
from martlet.graph.sites import Site
from martlet.graph.trace import example_values
from martlet.measure.macs import macs_by_node

ALLOCATIONS = {"greedy": allocate_greedily, "milp": allocate_exactly}
OFFSETS = (-1, 0, 1, 2, 3, 4)
"""Bits fewer or more than the average. Two fewer lose more than a sum of small errors can tell."""
BITS = range(2, 9)
IMAGES = 8

Round = Callable[[Call, int], Fitted]
"""How a call's operands and weight are rounded with so many bits, an image apart."""


def allocate_bits(
    graph_module: GraphModule,
    found: Sequence[Site],
    images: Tensor,
    weight_bits: int,
    activation_bits: int,
    method: str,
    rounded: Round,
    seed: int,
    progress: Progress,
) -> dict[Node, tuple[int, int]]:
    """Bits of the weight and of the activations of each multiplication, which the model as a whole uses on average.

    Two budgets: the bits of all weights, and MACs times the bits of both operands (BitOps); neither is more than
    weight_bits and activation_bits everywhere take. A cost is the squared error of a multiplication's output, each
    value times its gradient's square (`output_gradients`), with all else in floating point, on the first IMAGES of
    images (B, 3, H, W); that of the weight's rounding and that of the activations' add up. A multiplication whose
    operands all are decided by others keeps the average.

    method: one of ALLOCATIONS.
    """
    images = images[:IMAGES]
    weights, activations = ([bits + k for k in OFFSETS if bits + k in BITS] for bits in (weight_bits, activation_bits))
    gradients = output_gradients(graph_module, found, images, seed, progress, convolutions=True)
    height, width = images.shape[-2:]
    macs = macs_by_node(graph_module, example_values(graph_module, (height, width)))
    choices: dict[Node, dict[tuple[int, int], Choice]] = {}

    def decide(call: Call) -> Fitted:
        node, attention = call.site.node, call.site.is_attention
        if node not in gradients or not (call.operands or call.weight is not None):
            return Fitted({})
        exact = sample(call.output, len(images), attention)

        def cost(now: Mapping[int, Tensor]) -> float:
            error = sample(call.multiply(now), len(images), attention) - exact
            return float((error * gradients[node]).double().square().mean() * call.output.numel())

        by_bits = {bits: rounded(call, bits) for bits in {*weights, *activations}}
        inputs = {
            bits: cost({p: quantizer(call.operands[p].value) for p, quantizer in by_bits[bits].operands.items()})
            for bits in activations
        }
        if call.weight is None or call.site.weight is None:
            work = {a: macs[node].macs * a * a for a in activations}
            choices[node] = {(weight_bits, a): Choice(inputs[a], (0.0, float(work[a]))) for a in activations}
            return Fitted({})
        parameters = {}
        for bits in weights:
            quantizer = by_bits[bits].weight
            parameters[bits] = cost({} if quantizer is None else {call.site.weight: quantizer()})
        choices[node] = {
            (w, a): Choice(inputs[a] + parameters[w], (float(call.weight.numel() * w), float(macs[node].macs * w * a)))
            for w in weights
            for a in (activations if call.operands else [activation_bits])  # another decides
        }
        return Fitted({})

    fit(graph_module, found, images, decide, False, progress)
    average = (weight_bits, activation_bits)
    budgets = [sum(its[average].uses[i] for its in choices.values()) for i in range(2)]
    picked = ALLOCATIONS[method]([list(its.values()) for its in choices.values()], budgets)
    return {node: list(its)[i] for (node, its), i in zip(choices.items(), picked, strict=True)}
