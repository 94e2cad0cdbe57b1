"""What every technique that merges shares: models of one architecture, read one at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique

if TYPE_CHECKING:
    from martlet.core.technique import Batches

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """A model that was trained on from the one that others are merged into.

    read: gives its tensors by name. images: of its task; None if no method looks at any.
    """

    name: str
    read: Callable[[], State]
    images: Batches | None = None


@dataclass(frozen=True, kw_only=True)
class Merging(Technique):
    """Order of work of every technique that merges: parameters as the method says, other numbers as their mean.

    Such as the statistics of batch norms, which no method knows. What isn't a number with a fraction stays as it was.
    """

    stage: ClassVar[Stage] = Stage.MODULE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        if not context.finetunes:
            raise RecipeError(
                f"{self.name} merges fine-tunes of the model, and there are none; see: martlet merge --help"
            )
        module = model.module
        with torch.no_grad():
            base = {name: parameter.detach() for name, parameter in module.named_parameters()}
            kept = module.state_dict().keys()  # other buffers follow from the architecture
            others = {name: b for name, b in module.named_buffers() if name in kept and b.is_floating_point()}
            means = averaged(others, context.finetunes)
            merged = self.merge(base, context.finetunes, model, context)
            for name, tensor in {**base, **others}.items():
                tensor.copy_(means[name] if name in means else merged[name])
        return {"models": [finetune.name for finetune in context.finetunes]}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        """The structure is as it was; values follow from the artifact's tensors."""

    @abstractmethod
    def merge(self, base: State, finetunes: Sequence[Finetune], model: Model, context: Context) -> State:
        """Parameters by name, from those of the model that all come from."""


def averaged(like: State, finetunes: Sequence[Finetune]) -> dict[str, Tensor]:
    """The mean of all, of the tensors that are named."""
    from martlet.functional.merging import Mean

    means = {name: Mean(tensor) for name, tensor in like.items()}
    for finetune in finetunes if means else ():
        state = finetune.read()
        for name, mean in means.items():
            mean.add_(state[name])
    return {name: mean.value for name, mean in means.items()}


def changes(base: State, finetunes: Sequence[Finetune]) -> Iterator[dict[str, Tensor]]:
    """The task vectors of each, by name."""
    for finetune in finetunes:
        state = finetune.read()
        yield {name: state[name] - tensor for name, tensor in base.items()}
