"""Tuning by layers that are put into the model and stay there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.training.tuning import Tuning
from martlet.vit.view import VitView, view


@dataclass(frozen=True, kw_only=True)
class Inserted(Tuning):
    """Layers of class `layer` take the place of parts of a plain vision transformer, hold them, and are learned."""

    layer: ClassVar[type[nn.Module]]
    learned: ClassVar[tuple[str, ...]]
    """Names of what a layer learns."""

    def check(self, model: Model) -> None:
        super().check(model)
        if any(isinstance(module, self.layer) for module in model.module.modules()):
            raise RecipeError(f"{self.name}: {model.name} has such layers already; `finetune` and `lora` train on")
        if view(model.module).family != "vit":
            raise RecipeError(f"{self.name}: {model.name} is no plain vision transformer; `lora` tunes any")

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self._put_in_(model)
        self.begin_(model)
        return super().apply_(model, context)

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        self._put_in_(model)

    def chosen(self, name: str, parameter: nn.Parameter) -> bool:
        parts = name.split(".")
        return "inner" not in parts and any(part in self.learned for part in parts)

    def _put_in_(self, model: Model) -> None:
        vit = view(model.module)
        for name, layer in self.layers(vit).items():
            model.module.set_submodule(name, layer)
        model.module.eval()

    def begin_(self, model: Model) -> None:
        """Before anything is learned: sets what layers begin from."""

    @abstractmethod
    def layers(self, vit: VitView) -> Mapping[str, nn.Module]:
        """What takes the place of the part of each name."""
