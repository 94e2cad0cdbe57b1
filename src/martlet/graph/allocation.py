"""Bits for each multiplication: its error with fewer and more of them, seen in the logits, under one budget for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
OFFSETS = (-2, -1, 0, 1, 2, 3)
"""Bits fewer or more than the average."""
BITS = range(2, 9)
IMAGES = 8

Round = Callable[[Call, int, int], Fitted]
"""How a call is rounded with so many bits of its weight and of its activations."""


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
    value times its gradient's square (`output_gradients`), by itself, with all else in floating point, on the first
    IMAGES of images (B, 3, H, W). One whose operands all are decided by others keeps the average.

    method: one of ALLOCATIONS.
    """
    images = images[:IMAGES]
    pairs = [(weight_bits + k, activation_bits + k) for k in OFFSETS]
    pairs = [pair for pair in pairs if set(pair) <= set(BITS)]
    gradients = output_gradients(graph_module, found, images, seed, progress, convolutions=True)
    height, width = images.shape[-2:]
    macs = macs_by_node(graph_module, example_values(graph_module, (height, width)))
    choices: dict[Node, list[Choice]] = {}

    def cost(call: Call) -> Fitted:
        node = call.site.node
        if node not in gradients or not (call.operands or call.weight is not None):
            return Fitted({})
        size = 0 if call.weight is None else call.weight.numel()
        exact = sample(call.output, len(images), call.site.is_attention)
        choices[node] = []
        for weight, activation in pairs:
            fitted = rounded(call, weight, activation)
            now = {p: quantizer(call.operands[p].value) for p, quantizer in fitted.operands.items()}
            if call.site.weight is not None and fitted.weight is not None:
                now[call.site.weight] = fitted.weight()
            error = sample(call.multiply(now), len(images), call.site.is_attention) - exact
            work = macs[node].macs * activation * (activation if call.weight is None else weight)
            value = float((error * gradients[node]).double().square().mean() * call.output.numel())
            choices[node].append(Choice(value, (float(size * weight), float(work))))
        return Fitted({})

    fit(graph_module, found, images, cost, False, progress)
    average = pairs.index((weight_bits, activation_bits))
    budgets = [sum(layer[average].uses[i] for layer in choices.values()) for i in range(2)]
    picked = ALLOCATIONS[method](list(choices.values()), budgets)
    return {node: pairs[i] for node, i in zip(choices, picked, strict=True)}
