"""Updates of low rank, by the peft library: put beside each Linear before training, and added to it after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from martlet.training.tuning import Few, peft

PREFIX = "lora_"


class LowRank(Few):
    """config: peft's. before: is shown the model and the config before anything is put in."""

    def __init__(
        self,
        smoothing: float,
        heads: Iterable[str],
        config: Any,
        before: Callable[[nn.Module, Any], None] | None = None,
    ) -> None:
        super().__init__(smoothing, heads, lambda name, parameter: PREFIX in name)
        self.config, self.before = config, before

    def prepare_(self, student: nn.Module) -> None:
        library = peft("lora")
        if self.before is not None:
            self.before(student, self.config)
        library.inject_adapter_in_model(self.config, student)

    def finish_(self, student: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        for name, layer in [(n, m) for n, m in student.named_modules() if isinstance(m, LoraLayer)]:
            layer.merge()  # type: ignore[operator]
            base = layer.get_base_layer()
            base.__dict__.pop("_peft_loraga_grad", None)
            student.set_submodule(name, base)
        for name in ("peft_config", "_hf_peft_config_loaded"):
            student.__dict__.pop(name, None)
