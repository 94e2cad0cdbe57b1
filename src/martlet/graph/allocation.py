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

    A cost is the squared error of a multiplication's output with all else in floating point, on the first IMAGES of
    images (B, 3, H, W): each value times its gradient's square (`output_gradients`), or for `relevance` relative to the
    output's mean square, times the share of the predicted logit that goes through it (`layer_relevance`). That of the
    weight's rounding and that of the activations' add up. A multiplication whose operands all are decided by others, or
    that no image reaches, keeps the average.

    method: one of ALLOCATIONS. budget: one of BUDGETS; under `size`, activations keep theirs.
    """
    images = images[:IMAGES]
    weights, activations = ([bits + k for k in OFFSETS if bits + k in BITS] for bits in (weight_bits, activation_bits))
    if budget == "size":
        activations = [activation_bits]
    height, width = images.shape[-2:]
    macs = macs_by_node(graph_module, example_values(graph_module, (height, width)))
    measure = _by_relevance if method == "relevance" else _by_gradients
    price = measure(graph_module, found, images, seed, progress)
    choices: dict[Node, dict[tuple[int, int], Choice]] = {}

    def decide(call: Call) -> Fitted:
        node = call.site.node
        if not (call.operands or call.weight is not None) or price(call, call.output) is None:
            return Fitted({})

        def cost(now: Mapping[int, Tensor]) -> float:
            return price(call, call.multiply(now) - call.output) or 0.0

        by_bits = {bits: rounded(call, bits) for bits in {*weights, *activations}}
        inputs = {
            bits: cost({p: quantizer(call.operands[p].value) for p, quantizer in by_bits[bits].operands.items()})
            for bits in activations
        }
        if call.weight is None or call.site.weight is None:
            choices[node] = {
                (weight_bits, a): Choice(inputs[a], (0.0, float(macs[node].macs * a * a))) for a in activations
            }
            return Fitted({})
        parameters = {}
        for bits in weights:
            quantizer = by_bits[bits].weight
            parameters[bits] = cost({} if quantizer is None else {call.site.weight: quantizer()})
        size, work = call.weight.numel(), macs[node].macs
        choices[node] = {
            (w, a): Choice(inputs[a] + parameters[w], (float(size * w), float(work * w * a)))
            for w in weights
            for a in (activations if call.operands else [activation_bits])  # another decides
        }
        return Fitted({})

    fit(graph_module, found, images, decide, False, progress)
    average = (weight_bits, activation_bits)
    kept = BUDGETS[budget]
    budgets = [sum(its[average].uses[i] for its in choices.values()) for i in kept]
    layers = [[Choice(c.cost, tuple(c.uses[i] for i in kept)) for c in its.values()] for its in choices.values()]
    picked = ALLOCATIONS[method](layers, budgets)
    return {node: list(its)[i] for (node, its), i in zip(choices.items(), picked, strict=True)}


Price = Callable[[Call, Tensor], float | None]
"""What an error of a call's output costs; None where no image reaches it."""


def _by_gradients(
    graph_module: GraphModule, found: Sequence[Site], images: Tensor, seed: int, progress: Progress
) -> Price:
    gradients = output_gradients(graph_module, found, images, seed, progress, convolutions=True)

    def price(call: Call, error: Tensor) -> float | None:
        if call.site.node not in gradients:
            return None
        weighted = sample(error, len(images), call.site.is_attention) * gradients[call.site.node]
        return float(weighted.double().square().mean() * error.numel())

    return price


def _by_relevance(
    graph_module: GraphModule, found: Sequence[Site], images: Tensor, seed: int, progress: Progress
) -> Price:
    shares = layer_relevance(graph_module, found, images, progress)

    def price(call: Call, error: Tensor) -> float | None:
        share, signal = shares[call.site.node], float(call.output.double().square().mean())
        return share * float(error.double().square().mean()) / signal if share and signal else None

    return price
