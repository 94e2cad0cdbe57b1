"""What an error of a multiplication's output costs in the logits: to first order, for a sample of it; and as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.technique import Progress
from martlet.graph.observe import OneBatch, observe_gradients
from martlet.graph.sites import Site
from martlet.graph.trace import Walk

ROWS = 512
"""Of a Linear, over all images."""
IMAGES = 4
"""Of an attention product, whose heads and tokens are all kept."""


def output_gradients(
    graph_module: GraphModule,
    found: Sequence[Site],
    images: Tensor,
    seed: int,
    progress: Progress,
    convolutions: bool = False,
) -> dict[Node, Tensor]:
    """For each Linear and attention product a sample of the gradients of random combinations of logits.

    Laid out as `sample` takes a value of the node over the same images. A product that no image reaches has none.
    convolutions: theirs too.
    """
    [placeholder] = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    reached, total = _reached(placeholder), len(images)
    watched = [site for site in found if (convolutions or site.kind != "conv") and site.node in reached]
    parts: dict[Node, list[Tensor]] = {site.node: [] for site in watched}
    seen = dict.fromkeys(parts, 0)

    def look(values: Sequence[Tensor], gradients: Sequence[Tensor], site: Site) -> None:
        here = len(values[1])
        if len(gradients[0]) % here == 0:
            parts[site.node].append(_take(gradients[0], here, total, seen[site.node], site.is_attention))
        seen[site.node] += here

    watch = [
        ((site.node, placeholder), lambda values, gradients, site=site: look(values, gradients, site))
        for site in watched
    ]
    observe_gradients(graph_module, OneBatch(images), watch, seed, progress, "observe gradients")
    return {node: torch.cat(kept) for node, kept in parts.items() if kept}


def sample(x: Tensor, images: int, attention: bool) -> Tensor:
    """Rows (R, C) of a tensor (B n, …, C) of so many images, as many of each; of an attention's, all of some images.

    The same ones that `output_gradients` keeps. What isn't made of images comes back as it is.
    """
    return _take(x, images, images, 0, attention) if len(x) % images == 0 else x


def _take(x: Tensor, here: int, total: int, first: int, attention: bool) -> Tensor:
    """x: of the images `first` to `first + here` of `total`."""
    by_image = x.unflatten(0, (here, -1))  # (b, n, …)
    if attention:
        step = max(1, total // IMAGES)
        return by_image[-first % step :: step].flatten(0, 1)
    rows = by_image.flatten(1, -2)  # (b, R, C)
    return rows[:, :: max(1, rows.shape[1] // max(1, ROWS // total))].flatten(0, 1)


def _reached(placeholder: Node) -> set[Node]:
    found = {placeholder}
    for node in placeholder.graph.nodes:
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def changed_logits(
    graph_module: GraphModule, images: Tensor, groups: Sequence[Mapping[Node, Callable[..., Tensor]]]
) -> tuple[Tensor, list[Tensor]]:
    """The logits (B, K) of a graph, and those with one group of its nodes at a time computed otherwise.

    groups: by node, none of them without any, what takes the node's arguments and gives its value. What comes before
    the first node of a group is computed once for all.
    """
    walk = _Forks(graph_module, groups)
    with torch.no_grad():
        logits = walk.run(images)
    return logits, [walk.logits[i] for i in range(len(groups))]


class _Forks(Walk):
    """A run from which others branch off where they begin to differ."""

    def __init__(self, graph_module: GraphModule, groups: Sequence[Mapping[Node, Callable[..., Tensor]]]) -> None:
        super().__init__(graph_module)
        self.nodes = list(graph_module.graph.nodes)
        self.groups: dict[Node, list[int]] = {}
        for i, group in enumerate(groups):
            self.groups.setdefault(next(node for node in self.nodes if node in group), []).append(i)
        self.changes = groups
        self.logits: dict[int, Tensor] = {}

    def run_node(self, n: Node) -> object:
        for i in self.groups.get(n, ()):
            self.logits[i] = self._branch(n, self.changes[i])
        return super().run_node(n)

    def _branch(self, start: Node, changes: Mapping[Node, Callable[..., Tensor]]) -> Tensor:
        trunk, self.env = self.env, dict(self.env)
        value: object = None
        for node in self.nodes[self.nodes.index(start) :]:
            if node in changes:
                args, kwargs = self.fetch_args_kwargs_from_env(node)
                value = changes[node](*args, **kwargs)
            else:
                value = super().run_node(node)
            self.env[node] = value
            for dead in self.user_to_last_uses.get(node, ()):
                del self.env[dead]
        self.env = trunk
        return self.module.graph.process_outputs(value)  # type: ignore[operator]
