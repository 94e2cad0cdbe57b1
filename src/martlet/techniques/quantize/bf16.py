"""bf16: the engine computes the floating-point parts in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from martlet.core.errors import UsageError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Choices, Context, Stage, Technique


@dataclass(frozen=True, kw_only=True)
class BF16(Technique):
    """Tell the engine to compute whatever is floating point in bfloat16.

    Weights stay as they are in the file. On its own it halves the memory traffic of a float model; after `int8` it
    governs what int8 left over: residuals, norms, softmax.

    Args:
        required: refuse an engine that has no fast bfloat16 on this machine; if false, it goes on in float32 there.
            The record says which it was.

    Needs: nothing.
    Cost: none at compress time.
    Paper: none; Kalamkar et al., 2019, arXiv 1905.12322, describe the format.
    Differs: nothing known.
    Raises: UsageError if bfloat16 is required and the engine doesn't have it.
    """

    name: ClassVar[str] = "bf16"
    stage: ClassVar[Stage] = Stage.ENGINE
    summary: ClassVar[str] = "run floating-point parts in bfloat16"
    paper: ClassVar[str] = "Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, 2019, arXiv 1905.12322"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FREE_PRECISION})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FREE_PRECISION})

    required: bool = True

    def check_engine(self, context: Context) -> None:
        if self.required and "bf16" not in context.precisions:
            raise UsageError(
                f"bf16: on this machine the engine computes fast in {' and '.join(context.precisions)} only; leave "
                f"bf16 out, or write `bf16: {{required: false}}` in a recipe to go on in f32"
            )

    def space(self) -> Choices:
        return Choices()

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        self.check_engine(context)
        model.precision = "bf16" if "bf16" in context.precisions else "f32"
        return {"precision": model.precision}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        model.precision = record.get("precision", "bf16")  # records of artifacts that had no choice are empty
