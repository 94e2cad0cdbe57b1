"""What an error of a multiplication's output costs in the logits, for a sample of its outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.technique import Progress
from martlet.graph.observe import OneBatch, observe_gradients
from martlet.graph.sites import Site

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
