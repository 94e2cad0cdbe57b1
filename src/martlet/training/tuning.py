"""What every technique shares that learns few weights: which they are, beside the classifier, and where they go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from martlet.core.errors import RecipeError, UsageError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage
from martlet.training.objective import CrossEntropy, Objective
from martlet.training.technique import Training


@dataclass(frozen=True, kw_only=True)
class Tuning(Training):
    """Labels, and a model whose weights stay, but for those of the classifier and those that `chosen` names."""

    stage: ClassVar[Stage] = Stage.MODULE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    needs_labels: ClassVar[bool] = True

    rate: float = 1e-3

    def check(self, model: Model) -> None:
        classifiers(model.module, model.num_classes, self.name)

    def objective(self, model: Model, context: Context) -> Objective:
        return Few(self.smoothing, [*classifiers(model.module, model.num_classes, self.name)], self.chosen)

    def chosen(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter, by its qualified name, is learned."""
        return False


class Few(CrossEntropy):
    """heads: names of modules that are learned; chosen: says of every other parameter whether it is."""

    def __init__(self, smoothing: float, heads: Iterable[str], chosen: Callable[[str, nn.Parameter], bool]) -> None:
        super().__init__(smoothing)
        self.heads, self.chosen = tuple(heads), chosen

    def groups(self, student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        learned = [
            parameter
            for name, parameter in student.named_parameters()
            if name.startswith(tuple(f"{head}." for head in self.heads)) or self.chosen(name, parameter)
        ]
        wide, narrow = ([p for p in learned if (p.ndim > 1) is several] for several in (True, False))
        groups = [{"params": wide, "weight_decay": weight_decay}, {"params": narrow, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]


def classifiers(module: nn.Module, num_classes: int, asker: str) -> dict[str, nn.Linear]:
    """The Linears at the end that give a number for each class, by name: one, or a distilled model's two.

    Raises:
        RecipeError: the model doesn't end so.
    """
    found: dict[str, nn.Linear] = {}
    for name, linear in reversed([(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)]):
        if linear.out_features != num_classes:
            break
        found[name] = linear
    if not found:
        raise RecipeError(f"{asker}: the model doesn't end in a Linear of {num_classes} classes, which is learned too")
    return found


def linears(module: nn.Module, num_classes: int, asker: str) -> dict[str, nn.Linear]:
    """All other Linears, by name, but those that their owner reads the weights of instead of calling them.

    Raises:
        RecipeError: there are none.
    """
    heads = classifiers(module, num_classes, asker)
    found = {name: m for name, m in module.named_modules() if type(m) is nn.Linear and name not in heads}
    if not found:
        raise RecipeError(f"{asker}: the model has no Linear but its classifier; `finetune` trains all weights")
    return found


def peft(asker: str) -> Any:
    """The library.

    Raises:
        UsageError: it isn't installed.
    """
    try:
        import peft
    except ImportError:
        raise UsageError(f"{asker} needs peft: pip install 'martlet[tune]'") from None
    return peft
