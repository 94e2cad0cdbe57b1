"""Runs a traced graph over images and shows tensors to whoever asked for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from martlet.core.technique import Batches, Progress


class _Observer(Interpreter):
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


def _run(observer: _Observer, images: Batches, progress: Progress, what: str) -> None:
    done = 0
    with torch.no_grad():
        for batch in images:
            observer.run(batch)
            done += len(batch)
            progress(what, done, images.num_images)
