"""Bits for each multiplication: its error with fewer and more of them, seen in the logits, under one budget for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.technique import Progress
from martlet.functional.allocation import Choice, allocate_exactly, allocate_greedily
from martlet.graph.fit import Call, Fitted, fit
from martlet.graph.relevance import layer_relevance
from martlet.graph.sensitivity import output_gradients, sample
from martlet.graph.sites import Site
from martlet.graph.trace import example_values
from martlet.measure.macs import macs_by_node

ALLOCATIONS = {"greedy": allocate_greedily, "milp": allocate_exactly, "relevance": allocate_exactly}
BUDGETS = {"average": (0, 1), "size": (0,), "bitops": (1,)}
"""What is kept within: the bits of all weights, MACs times the bits of both operands, or each of the two."""
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
    budget: str,
    rounded: Round,
    seed: int,
    progress: Progress,
) -> dict[Node, tuple[int, int]]:
    """Bits of the weight and of the activations of each multiplication, within what equal bits everywhere take.

    Costs of the weight's bits and of the activations' add up, on the first IMAGES of images (B, 3, H, W). For
    `relevance` a cost is the share of the predicted logit that goes through a multiplication (`layer_relevance`)
    times 4^-bits, as the squared error of an even grid falls. Else it is the squared error of the output with all else
    in floating point, each value times its gradient's square (`output_gradients`). A multiplication whose operands all
    are decided by others, or that no image reaches, keeps the average.

    method: one of ALLOCATIONS. budget: one of BUDGETS; under `size`, activations keep theirs.
    """
    images = images[:IMAGES]
    weights, activations = ([bits + k for k in OFFSETS if bits + k in BITS] for bits in (weight_bits, activation_bits))
    if budget == "size":
        activations = [activation_bits]
    height, width = images.shape[-2:]
    macs = macs_by_node(graph_module, example_values(graph_module, (height, width)))
    if method == "relevance":
        price = _by_relevance(layer_relevance(graph_module, found, images, progress))
    else:
        gradients = output_gradients(graph_module, found, images, seed, progress, convolutions=True)
        price = _by_gradients(gradients, rounded, len(images))
    choices: dict[Node, dict[tuple[int, int], Choice]] = {}

    def decide(call: Call) -> Fitted:
        node = call.site.node
        if (costs := price(call, weights, activations)) is None:
            return Fitted({})
        parameters, inputs = costs
        if call.weight is None:
            work = {a: macs[node].macs * a * a for a in activations}
            choices[node] = {(weight_bits, a): Choice(inputs[a], (0.0, float(work[a]))) for a in activations}
            return Fitted({})
        size, work = call.weight.numel(), macs[node].macs
        choices[node] = {
            (w, a): Choice(inputs[a] + parameters[w], (float(size * w), float(work * w * a)))
            for w in weights
            for a in (activations if call.operands else [activation_bits])  # another decides
        }
        return Fitted({})

    fit(graph_module, found, images, decide, False, progress)
    average, kept = (weight_bits, activation_bits), BUDGETS[budget]
    budgets = [sum(its[average].uses[i] for its in choices.values()) for i in kept]
    layers = [[Choice(c.cost, tuple(c.uses[i] for i in kept)) for c in its.values()] for its in choices.values()]
    picked = ALLOCATIONS[method](layers, budgets)
    return {node: list(its)[i] for (node, its), i in zip(choices.items(), picked, strict=True)}


Costs = tuple[dict[int, float], dict[int, float]]
"""By bits of the weight, and by those of the activations."""
Price = Callable[[Call, Sequence[int], Sequence[int]], Costs | None]
"""Costs of a call at bits of its weight and its activations; None where there is nothing to choose."""


def _by_gradients(gradients: Mapping[Node, Tensor], rounded: Round, images: int) -> Price:
    def price(call: Call, weights: Sequence[int], activations: Sequence[int]) -> Costs | None:
        node, attention = call.site.node, call.site.is_attention
        if node not in gradients or not (call.operands or call.weight is not None):
            return None
        exact = sample(call.output, images, attention)

        def cost(now: Mapping[int, Tensor]) -> float:
            error = sample(call.multiply(now), images, attention) - exact
            return float((error * gradients[node]).double().square().mean() * call.output.numel())

        by_bits = {bits: rounded(call, bits) for bits in {*weights, *activations}}
        parameters = dict.fromkeys(weights, 0.0)
        for bits in weights:
            if call.site.weight is not None and (quantizer := by_bits[bits].weight) is not None:
                parameters[bits] = cost({call.site.weight: quantizer()})
        inputs = {
            bits: cost({p: quantizer(call.operands[p].value) for p, quantizer in by_bits[bits].operands.items()})
            for bits in activations
        }
        return parameters, inputs

    return price


def _by_relevance(shares: Mapping[Node, float]) -> Price:
    def price(call: Call, weights: Sequence[int], activations: Sequence[int]) -> Costs | None:
        share = shares[call.site.node]
        if not share or not (call.operands or call.weight is not None):
            return None
        return tuple({b: share * 4.0**-b for b in its} for its in (weights, activations))  # type: ignore[return-value]

    return price
