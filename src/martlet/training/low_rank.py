"""Updates of low rank, by the peft library: put beside each Linear before training, and added to it after."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.training.objective import Objective
from martlet.training.tuning import Few, Tuning, classifiers, linears, peft
from martlet.vit.parts import follow_

PREFIX = "lora_"


@dataclass(frozen=True, kw_only=True)
class LowRankTuning(Tuning):
    """What all techniques share that learn an update of low rank for every Linear, and the classifier.

    Args:
        rank: of each update.
        alpha: the update is scaled by alpha / rank.
    """

    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.alpha > 0:
            raise RecipeError(f"{self.name}: rank is {self.rank} and alpha {self.alpha}; both have to be more than 0")

    def check(self, model: Model) -> None:
        peft(self.name)
        linears(model.module, model.num_classes, self.name)

    def objective(self, model: Model, context: Context) -> Objective:
        heads = [*classifiers(model.module, model.num_classes, self.name)]
        return LowRank(
            self.smoothing,
            heads,
            self.config(model),
            chosen=lambda name, parameter: PREFIX in name or self.chosen(name, parameter),
        )

    def config(self, model: Model, ranks: Mapping[str, int] | None = None) -> Any:
        """peft's, for updates of all Linears, or for some of other ranks, by name, at the same alpha / rank."""
        ranks = ranks or {}
        return peft(self.name).LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=[*ranks] or [*linears(model.module, model.num_classes, self.name)],
            exclude_modules=[*classifiers(model.module, model.num_classes, self.name)],
            rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
            alpha_pattern={re.escape(name): self.alpha * rank / self.rank for name, rank in ranks.items()},
        )


class LowRank(Few):
    """config: peft's. before: is shown the model and the config before anything is put in. chosen: what is learned
    beside the classifier; without it, the updates.
    """

    def __init__(
        self,
        smoothing: float,
        heads: Iterable[str],
        config: Any,
        before: Callable[[nn.Module, Any], None] | None = None,
        chosen: Callable[[str, nn.Parameter], bool] = lambda name, parameter: PREFIX in name,
    ) -> None:
        super().__init__(smoothing, heads, chosen)
        self.config, self.before = config, before

    def prepare_(self, student: nn.Module) -> None:
        library = peft("lora")
        if self.before is not None:
            self.before(student, self.config)
        library.inject_adapter_in_model(self.config, student)
        follow_(student)

    def finish_(self, student: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        for name, layer in [(n, m) for n, m in student.named_modules() if isinstance(m, LoraLayer)]:
            layer.merge()  # type: ignore[operator]
            base = layer.get_base_layer()
            base.__dict__.pop("_peft_loraga_grad", None)
            student.set_submodule(name, base)
        follow_(student)
        for name in ("peft_config", "_hf_peft_config_loaded"):
            student.__dict__.pop(name, None)
