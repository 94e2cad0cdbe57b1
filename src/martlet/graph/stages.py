"""Cuts the graph of a model that can stop early into stages, one an exit and the last, each a graph of its own."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from martlet.core.technique import Batches, Progress, silent
from martlet.graph.trace import shapes_of
from martlet.measure.macs import macs_by_node
from martlet.nn.exits import LEAVE, goes_on

IMAGES = "images"
aten = torch.ops.aten


class Leave(NamedTuple):
    """An exit of a graph. window: the qualified name of its tensor."""

    node: Node
    logits: Node
    confidence: Node
    window: str


class Stage(NamedTuple):
    """A part of a model, from some values to others, all with the images as their first dimension.

    module: takes `inputs` and gives a tuple of `outputs`: the logits, the confidence unless it is the last stage, and
    what later stages need. Values go by one name in all stages; what the model is given is called `images`.
    """

    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def leaves(graph_module: GraphModule) -> list[Leave]:
    """The exits in the order in which an image comes to them; none if the graph doesn't end in one."""
    found: list[Leave] = []
    node = _result(graph_module)
    while node.target is LEAVE:
        logits, confidence, later, window = node.args
        assert isinstance(logits, Node) and isinstance(confidence, Node)
        assert isinstance(later, Node) and isinstance(window, Node)
        found.append(Leave(node, logits, confidence, str(window.target)))
        node = later
    return found


def window(graph_module: GraphModule, exit_: Leave) -> Tensor:
    """The exit's window (2,), in the memory of the graph."""
    owner, _, leaf = exit_.window.rpartition(".")
    return getattr(graph_module.get_submodule(owner), leaf)


def stages(graph_module: GraphModule) -> list[Stage]:
    """The stages: stage k is what exit k needs and no earlier one has computed; the last is what is left.

    What follows from no image, such as rounded weights, is in every stage that needs it.
    """
    ends = _ends(graph_module)
    varies = _varying(graph_module)
    [images] = graph_module.graph.find_nodes(op="placeholder")
    made_in = {images: -1}  # the stage that computes a value
    for k, nodes in enumerate(ends):
        made_in |= dict.fromkeys(_above(nodes, made_in) & varies, k)
    for node in graph_module.graph.nodes:
        if node in made_in and node.target is operator.getitem:  # what is cut are tensors, and not lists of them
            made_in[node] = made_in[node.args[0]]
    needs: list[set[Node]] = [set() for _ in ends]  # of earlier stages
    for node, k in made_in.items():
        needs[max(k, 0)].update(source for source in _sources(node) if source in varies and made_in[source] < k)
    for k, nodes in enumerate(ends):  # what an earlier stage has made already passes through
        needs[k].update(node for node in nodes if made_in.get(node, k) < k)
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    found = []
    for k, nodes in enumerate(ends):
        later = set[Node]().union(*needs[k + 1 :]) - set(nodes)
        crossing = sorted((node for node in later if made_in[node] == k), key=order.__getitem__)
        inputs = sorted(needs[k], key=order.__getitem__)
        found.append(_cut(graph_module, inputs, [*nodes, *crossing], images))
    return found


def unstaged(graph_module: GraphModule) -> Stage:
    """The whole as one graph that computes everything: every exit's logits and confidence, then the last logits."""
    [images] = graph_module.graph.find_nodes(op="placeholder")
    return _cut(graph_module, [images], [node for nodes in _ends(graph_module) for node in nodes], images)


def run(parts: Sequence[Stage], images: Tensor) -> list[dict[str, Tensor]]:
    """Every stage on all images: what each gives, by name, in order: logits, confidence, more."""
    values, found = {IMAGES: images}, []
    for part in parts:
        given = dict(zip(part.outputs, part.module(*(values[name] for name in part.inputs)), strict=True))
        values |= given
        found.append(given)
    return found


def ask(parts: Sequence[Stage], batches: Batches, progress: Progress = silent) -> tuple[np.ndarray, np.ndarray]:
    """Every exit's confidence (E, N), and the first answer of each and of the last stage (E + 1, N)."""
    confidences, answers, done = [], [], 0
    for batch in batches:
        with torch.inference_mode():
            found = [[*given.values()] for given in run(parts, batch)]
        confidences.append(torch.stack([values[1] for values in found[:-1]]).float().numpy())
        answers.append(torch.stack([values[0].argmax(1) for values in found]).numpy())
        done += len(batch)
        progress("ask every exit", done, batches.num_images)
    return np.concatenate(confidences, 1), np.concatenate(answers, 1)


def leaving(graph_module: GraphModule, batches: Batches, progress: Progress = silent) -> tuple[np.ndarray, np.ndarray]:
    """The logits (N, K) with which each image leaves, and the stage (N,) after which."""
    parts, windows = stages(graph_module), [window(graph_module, exit_) for exit_ in leaves(graph_module)]
    logits, exits, done = [], [], 0
    for batch in batches:
        with torch.inference_mode():
            *found, last = [[*given.values()] for given in run(parts, batch)]
            its, left = last[0].clone(), torch.full((len(batch),), len(found))
            for k, (answer, confidence, *_) in reversed([*enumerate(found)]):
                gone = ~goes_on(confidence, windows[k])
                its[gone], left[gone] = answer[gone], k
        logits.append(its.float().numpy())
        exits.append(left.numpy())
        done += len(batch)
        progress("ask every exit", done, batches.num_images)
    return np.concatenate(logits), np.concatenate(exits)


def cumulative_macs(parts: Sequence[Stage], size: tuple[int, int]) -> list[int]:
    """MACs of one image of (H, W) up to the end of each stage."""
    total, found = 0, []
    for part, shapes in zip(parts, shapes_by_stage(parts, size), strict=True):
        total += sum(node.macs for node in macs_by_node(part.module, shapes).values())
        found.append(total)
    return found


def shapes_by_stage(parts: Sequence[Stage], size: tuple[int, int]) -> list[dict[Node, torch.Size]]:
    """Of each stage, the shapes of its tensors for one image of (H, W)."""
    values, found = {IMAGES: torch.zeros(1, 3, *size)}, []
    for part in parts:
        shapes, given = shapes_of(part.module, [values[name] for name in part.inputs])
        values |= zip(part.outputs, given, strict=True)
        found.append(shapes)
    return found


def _ends(graph_module: GraphModule) -> list[tuple[Node, ...]]:
    """What each stage is there for: the logits and the confidence of an exit, and the last logits."""
    exits = leaves(graph_module)
    last = exits[-1].node.args[2] if exits else _result(graph_module)
    assert isinstance(last, Node)
    return [*((each.logits, each.confidence) for each in exits), (last,)]


def _cut(graph_module: GraphModule, inputs: Sequence[Node], outputs: Sequence[Node], images: Node) -> Stage:
    """The graph from some values to others."""
    graph, copies = Graph(), dict[Node, Node]()
    # An exporter names what it makes as it likes, perhaps by the name of another node: so these look like none.
    names = {node: IMAGES if node is images else f"value.{node.name}" for node in (*inputs, *outputs)}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    wanted = _above(outputs, copies)
    for node in graph_module.graph.nodes:
        if node in wanted and _counts_images(node):
            copies[node] = graph.call_function(aten.sym_size.int, (copies[inputs[0]], 0))
            copies[node].meta = dict(node.meta)
        elif node in wanted:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return Stage(
        GraphModule(graph_module, graph), tuple(names[node] for node in inputs), tuple(names[node] for node in outputs)
    )


def _result(graph_module: GraphModule) -> Node:
    result = graph_module.graph.output_node().args[0]
    while isinstance(result, tuple | list):
        [result] = result
    assert isinstance(result, Node)
    return result


def _varying(graph_module: GraphModule) -> set[Node]:
    """What depends on the images, and not on their number alone."""
    varies = set[Node]()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" or not varies.isdisjoint(_sources(node)):
            varies.add(node)
    return varies


def _above(ends: Iterable[Node], known: Collection[Node]) -> set[Node]:
    """All that the ends follow from, themselves included, down to what is known."""
    found, work = set[Node](), list(ends)
    while work:
        node = work.pop()
        if node not in found and node not in known:
            found.add(node)
            work += _sources(node)
    return found


def _sources(node: Node) -> list[Node]:
    return [] if _counts_images(node) else node.all_input_nodes


def _counts_images(node: Node) -> bool:
    """The number of images, whichever tensor it was read from."""
    return node.target is aten.sym_size.int and node.args[1] == 0 and node.args[0].op == "placeholder"  # type: ignore[union-attr]
