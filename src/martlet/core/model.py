"""Model: what flows through a recipe."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from martlet.core.facts import ALL_FACTS, Fact
from martlet.core.technique import PRECISIONS, Stage, Technique

if TYPE_CHECKING:
    from torch import nn

    from martlet.data.preprocess import Preprocess

__all__ = ["PRECISIONS", "Model", "Step"]


@dataclass(kw_only=True)
class Step:
    """A technique that was applied, and the record that rebuilds the structure it left."""

    technique: Technique
    record: dict[str, Any]
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.technique.name,
            "settings": self.technique.settings(),
            "record": self.record,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Step:
        """Raises:
        RecipeError: a technique or a setting that this version doesn't have.
        """
        from martlet.core import registry

        technique = registry.technique(data["name"]).from_settings(data["settings"])
        return cls(technique=technique, record=data["record"], seconds=data["seconds"])


@dataclass(kw_only=True)
class Model:
    """A vision classifier with everything needed to run, rebuild and compress it.

    name: as the user typed it, `timm:vit_tiny_patch16_224`.
    module: maps images (B, 3, H, W) to logits (B, K). An `nn.Module` at first, an `fx.GraphModule` once traced.
    origin: JSON from which `martlet.source.rebuild` makes the same architecture without weights.
    precision: what the engine computes the floating-point parts in; one of PRECISIONS.
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    num_classes: int
    origin: dict[str, Any]
    class_names: tuple[str, ...] | None = None
    stage: Stage = Stage.MODULE
    facts: frozenset[Fact] = ALL_FACTS
    steps: list[Step] = field(default_factory=list)
    precision: str = "f32"

    def copy(self) -> Model:
        """A deep copy of the module; everything else is immutable or copied.

        What modules keep of what follows from their weights, they forget: such tensors may hang on a gradient, and
        can't be copied then, and the copy's weights may change. A graph keeps nothing.
        """
        if self.stage is Stage.MODULE:
            modes = [(part, part.training) for part in self.module.modules()]
            self.module.train()  # which empties the caches of LeViT and EfficientViT
            for part, training in modes:
                part.training = training
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module)
        twin.steps = list(self.steps)
        return twin

    @property
    def rounded(self) -> bool:
        """True if some tensor is rounded to fewer values than floating point has."""
        return any(hasattr(module, "simulated") for module in self.module.modules())

    @property
    def formats(self) -> frozenset[str]:
        """The formats that tensors are rounded to whose codes aren't evenly spaced."""
        rounding = (module for module in self.module.modules() if hasattr(module, "simulated"))
        return frozenset(its for module in rounding if (its := getattr(module, "format", None)))

    @property
    def simulated(self) -> bool:
        """True if some tensor is rounded in a way that no engine's kernel can use, whatever its format."""
        return any(getattr(module, "simulated", False) for module in self.module.modules())
