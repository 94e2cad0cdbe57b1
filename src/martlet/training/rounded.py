"""Training a quantized graph as it is rounded: layers with parameters stand in for quantizers while it learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import GraphModule

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.graph.trace import trace
from martlet.nn.straight_through import Learned, LearnedSteps, LearnedWeight, Passing, learned
from martlet.training.objective import RATE, Taught, Teacher
from martlet.vit.sparsity import Sparsity

STEP_RATE = 0.5
"""Of a step's learning rate, over that of weights. Steps are learned relative to what they were."""


def untouched(model: Model, context: Context, asker: str) -> tuple[Teacher, GraphModule]:
    """The teacher, and its graph.

    Raises:
        RecipeError: it is rounded itself.
        UsageError: it has other classes.
    """
    teacher = context.teacher
    assert teacher is not None
    if teacher.rounded:
        raise RecipeError(f"{asker}: the teacher {teacher.name} is rounded itself; give another, as it was before")
    graph = teacher.module if teacher.stage is Stage.GRAPH else trace(teacher.copy().module, teacher.preprocess.size)
    assert isinstance(graph, GraphModule)
    return Teacher(teacher, model), graph


StandIn = Callable[[str, nn.Module], Learned | None]
"""What learns in the place of a module of that name; None where it stays."""


def learning(model: Model, untouched: GraphModule) -> StandIn:
    """Weights, their steps and the scales of activations learn; zeros that a technique before has left stay.

    untouched: the graph whose weights those of the model were before they were rounded, where names still agree.
    """
    weights = {f"{name}_quantizer": weight for name, weight in untouched.named_parameters()}
    patterns = (step.technique for step in model.steps if isinstance(step.technique, Sparsity))
    zeros = next(((its.zeros, its.of, its.run) for its in patterns if its.zeros), None)

    def stand_in(name: str, module: nn.Module) -> Learned | None:
        layer = learned(module, weights.get(name))
        if zeros is not None and isinstance(layer, LearnedWeight):
            layer.make_zero_(*zeros)
        return layer

    return stand_in


def check_rounded(model: Model, asker: str) -> None:
    """Raises:
    RecipeError: nothing is.
    """
    if not any(learned(module) is not None for module in model.module.modules()):
        raise RecipeError(
            f"{asker}: nothing of {model.name} is rounded yet; put what quantizes before it: uniform | {asker}"
        )


class Rounded(Taught):
    """steps_alone: nothing but the steps of weights is learned."""

    def __init__(self, teacher: Teacher, stand_in: StandIn, steps_alone: bool = False) -> None:
        super().__init__(teacher)
        self._stand_in, self.steps_alone = stand_in, steps_alone
        self.layers: dict[str, Learned] = {}

    def prepare_(self, student: nn.Module) -> None:
        assert isinstance(student, GraphModule)
        for name, module in list(student.named_modules()):
            layer = self._stand_in(name, module)
            if layer is not None:
                self.layers[name] = layer.to(next((b.device for b in module.buffers()), None))
                student.set_submodule(name, layer)

    def finish_(self, student: nn.Module) -> None:
        assert isinstance(student, GraphModule)
        for name, layer in self.layers.items():
            its = student.get_submodule(name)
            assert isinstance(its, type(layer))
            its.finish_()
            student.set_submodule(name, its.quantizer)

    def groups(self, student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        if self.steps_alone:
            alone = [layer.factor for layer in self.layers.values() if isinstance(layer, LearnedSteps)]
            return [{"params": alone, "weight_decay": 0.0}]
        student.requires_grad_(True)
        steps = [layer.factor for layer in self.layers.values() if not isinstance(layer, Passing)]
        weights = [layer.weight for layer in self.layers.values() if isinstance(layer, LearnedWeight)]
        apart = {id(parameter) for parameter in (*steps, *weights)}
        others = [parameter for parameter in student.parameters() if id(parameter) not in apart]
        groups = [
            {"params": weights, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
            {"params": steps, "weight_decay": 0.0, RATE: STEP_RATE},
        ]
        return [group for group in groups if group["params"]]
