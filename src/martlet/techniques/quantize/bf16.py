"""bf16: the engine computes the floating-point parts in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique


@dataclass(frozen=True, kw_only=True)
class BF16(Technique):
    """Tell the engine to compute whatever is floating point in bfloat16.

    Weights stay as they are in the file. On its own it halves the memory traffic of a float model; after `int8` it
    governs what int8 left over: residuals, norms, softmax.

    Needs: nothing.
    Cost: none at compress time. On a processor without bf16 instructions the engine refuses it.
    Paper: none; Kalamkar et al., 2019, arXiv 1905.12322, describe the format.
    Differs: nothing known.
    """

    name: ClassVar[str] = "bf16"
    stage: ClassVar[Stage] = Stage.ENGINE
    summary: ClassVar[str] = "run floating-point parts in bfloat16"
    paper: ClassVar[str] = "Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, 2019, arXiv 1905.12322"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FREE_PRECISION})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FREE_PRECISION})

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        model.precision = "bf16"
        return {}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        model.precision = "bf16"
