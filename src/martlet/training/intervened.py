"""Training a quantized graph in which a teacher's signals take the place of its own, until it does without them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from martlet.core.errors import UsageError
from martlet.functional.distillation import divergence, relative_error
from martlet.graph.attention import signals
from martlet.training.objective import Batch, Teacher
from martlet.training.rounded import Rounded, StandIn

STAGES = (("output", 1 / 6), ("context", 1 / 3), ("weights", 1.0))
"""What of an attention is replaced, until which share of the intervention is over."""
LEARNED = ("scores", "output")
"""What of an attention is learned besides, as an error relative to the teacher's."""
KINDS = ("scores", "weights", "context", "output")
MASKED = -50.0
"""Scores below it are masks, which say nothing."""


class Signal(nn.Module):
    """What a node of a student gives. In a step it may be compared with a teacher's, or replaced by it."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.name, self.kind, self.theirs, self.intervenes = name, kind, cast(Tensor | None, None), False
        self.error: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.theirs is None:
            return x
        if self.theirs.shape != x.shape:
            raise UsageError(
                f"the teacher has {tuple(self.theirs.shape[1:])} at {self.name} where the model has "
                f"{tuple(x.shape[1:])}; give a teacher of the same shape, or train with lsq, which needs none"
            )
        if self.kind in LEARNED:
            masked = (self.theirs < MASKED) & (self.kind == "scores")
            self.error = relative_error(*(each.masked_fill(masked, 0) for each in (x, self.theirs)))
        return self.theirs if self.intervenes else x


class Telling:
    """A graph that gives its signals besides its logits, by attention and kind. No part of any module, so not kept."""

    def __init__(self, graph_module: GraphModule) -> None:
        graph, copies = Graph(), dict[Node, Node]()
        logits = pytree.tree_leaves(graph.graph_copy(graph_module.graph, copies))[0]
        nodes = [getattr(each, kind) for each in signals(graph_module) for kind in KINDS]
        graph.output((logits, [None if node is None else copies[node] for node in nodes]))
        self._module = GraphModule(graph_module, graph)

    def to(self, device: torch.device) -> None:
        self._module.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, list[dict[str, Tensor | None]]]:
        logits, told = self._module(images)
        parts = [told[i : i + len(KINDS)] for i in range(0, len(told), len(KINDS))]
        return logits, [dict(zip(KINDS, part, strict=True)) for part in parts]


class Intervened(Rounded):
    """graph: the teacher's. share: of the steps, in which it intervenes."""

    def __init__(self, teacher: Teacher, graph: GraphModule, stand_in: StandIn, share: float) -> None:
        super().__init__(teacher, stand_in)
        self.share, self.telling, self.signals = share, Telling(graph), list[dict[str, Signal]]()

    def prepare_(self, student: nn.Module) -> None:
        super().prepare_(student)
        assert isinstance(student, GraphModule)
        self.telling.to(next(student.parameters()).device)
        for i, attention in enumerate(signals(student)):
            self.signals.append({})
            for kind in KINDS:
                node: Node | None = getattr(attention, kind)
                if node is not None:
                    self.signals[i][kind] = signal = Signal(node.name, kind)
                    student.add_submodule(f"signal_{i}_{kind}", signal)
                    with student.graph.inserting_after(node):
                        new = student.graph.call_module(f"signal_{i}_{kind}", (node,))
                    node.replace_all_uses_with(new, lambda user, new=new: user is not new)
        student.recompile()

    def finish_(self, student: nn.Module) -> None:
        assert isinstance(student, GraphModule)
        for node in list(student.graph.nodes):
            if node.op == "call_module" and isinstance(student.get_submodule(node.target), Signal):
                node.replace_all_uses_with(node.args[0])
                student.graph.erase_node(node)
                student.delete_submodule(node.target)
        student.recompile()
        super().finish_(student)

    def replaced(self, step: int, steps: int) -> str | None:
        """The kind of signal that the teacher gives in a step, from 0, of so many; None once it doesn't intervene."""
        over = step / (self.share * steps) if self.share else 1.0
        return next((kind for kind, until in STAGES if over < until), None)

    def loss(self, student: nn.Module, batch: Batch) -> Tensor:
        wanted, told = self.telling(self.teacher.view(batch.images))
        if len(told) != len(self.signals):
            raise UsageError(
                f"the teacher {self.teacher.model.name} has {len(told)} attentions and the model has "
                f"{len(self.signals)}; give a teacher of the same shape, or train with lsq, which needs none"
            )
        replaced = self.replaced(batch.step, batch.steps)
        both = zip(self.signals, told, strict=True)
        pairs = [(kind, signal, theirs[kind]) for own, theirs in both for kind, signal in own.items()]
        try:
            for kind, signal, theirs in pairs:
                signal.theirs, signal.intervenes = theirs, kind == replaced
            loss = divergence(student(batch.images), wanted)
            errors = [signal.error for _, signal, _ in pairs if signal.error is not None]
        finally:
            for _, signal, _ in pairs:
                signal.theirs = signal.error = None
        return loss + torch.stack(errors).sum() / len(self.signals)
