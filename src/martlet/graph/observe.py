"""Runs a traced graph over images and shows tensors to whoever asked for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.technique import Batches, Progress
from martlet.graph.trace import Walk

MICRO_BATCH = 4
"""Images whose activations are held at once for a backward pass."""


class OneBatch:
    """A tensor (B, 3, H, W) as batches: one."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.num_images = images, len(images)

    def __iter__(self) -> Iterator[Tensor]:
        yield self.images


class _Observer(Walk):
    def __init__(self, graph_module: GraphModule, watch: Mapping[Node, Callable[..., None]], inputs: bool) -> None:
        super().__init__(graph_module)
        self.watch, self.inputs = watch, inputs

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if (look := self.watch.get(n)) is not None:
            if self.inputs:
                look(result, *self.fetch_args_kwargs_from_env(n)[0])
            else:
                look(result)
        return result


def observe(
    graph_module: GraphModule,
    images: Batches,
    watch: Mapping[Node, Callable[[Tensor], None]],
    progress: Progress,
    what: str,
) -> None:
    """Calls `watch[node](value)` for each batch. Values are freed as soon as the graph no longer needs them."""
    _run(_Observer(graph_module, watch, inputs=False), images, progress, what)


def observe_calls(
    graph_module: GraphModule,
    images: Batches,
    watch: Mapping[Node, Callable[..., None]],
    progress: Progress,
    what: str,
) -> None:
    """Calls `watch[node](value, *arguments)` for each batch, with the arguments that gave the value."""
    _run(_Observer(graph_module, watch, inputs=True), images, progress, what)


Look = Callable[[Sequence[Tensor], Sequence[Tensor]], None]


def observe_gradients(
    graph_module: GraphModule,
    images: Batches,
    watch: Sequence[tuple[Sequence[Node], Look]],
    seed: int,
    progress: Progress,
    what: str,
) -> None:
    """Calls `look(values, gradients)` for each batch and each group of nodes.

    The gradients are of r · logits with r random signs, drawn anew for each image. Their squares tell how much a small
    error of an element costs in the squared error of the logits: E[(r · J e)²] = |J e|² for the Jacobian J and any
    error e (Hutchinson's estimator; the Hessian-guided metric of Yuan et al., PTQ4ViT, 2022, arXiv 2111.12293, section
    4.2, with the squared error of the logits as its loss).
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = {node for nodes, _ in watch for node in nodes}
    done = 0
    for batch in images:
        for part in batch.split(MICRO_BATCH):
            kept: dict[Node, Tensor] = {}

            def keep(value: Tensor, node: Node, kept: dict[Node, Tensor] = kept) -> None:
                if value.requires_grad:  # a constant has no gradient, as nothing in it comes from an image
                    value.retain_grad()
                kept[node] = value

            looks = {node: (lambda value, node=node: keep(value, node)) for node in wanted}
            with torch.enable_grad():
                logits = _Observer(graph_module, looks, inputs=False).run(part.clone().requires_grad_())
                signs = torch.randint(2, logits.shape, generator=generator) * 2.0 - 1
                (logits * signs).sum().backward()
            for nodes, look in watch:
                values = [kept[node].detach() for node in nodes]
                look(values, [_gradient(kept[node]) for node in nodes])
        done += len(batch)
        progress(what, done, images.num_images)


def _gradient(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


def _run(observer: _Observer, images: Batches, progress: Progress, what: str) -> None:
    done = 0
    with torch.no_grad():
        for batch in images:
            observer.run(batch)
            done += len(batch)
            progress(what, done, images.num_images)
