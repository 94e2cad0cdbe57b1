"""coat: training whose optimizer keeps its moments in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.training.fp8_adamw import Fp8AdamW
from martlet.training.objective import CrossEntropy, Objective
from martlet.training.technique import Training


@dataclass(frozen=True, kw_only=True)
class Coat(Training):
    """Train all weights on labels, as `finetune`, with AdamW's moments in a quarter of the memory.

    For models whose moments don't fit. A power for each group of 128 numbers brings its range to that of FP8, which
    otherwise would round most of it to nothing. Where memory isn't short, `finetune` takes shorter steps.

    Shape: none changes.
    Needs: images with labels (`--train`).
    Cost: a step as of `finetune`, and two roundings of every moment; nothing at run time.
    Paper: Xi et al., COAT, 2025, arXiv 2410.19313, dynamic range expansion; held against the official code.
    Differs: activations aren't kept in FP8, which is the paper's other half. A group that is all alike gets a power of
        8, the official code's none. Written in torch, without kernels; torchao's AdamWFp8 has none of the expansion.
    Raises: RecipeError for a setting out of range, or images without labels; and as the loop does.
    """

    name: ClassVar[str] = "coat"
    summary: ClassVar[str] = "train on labels with the optimizer's moments in 8 bits"
    paper: ClassVar[str] = "Xi et al., COAT, 2025, arXiv 2410.19313"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS, Fact.FLOAT_ACTIVATIONS})
    needs_labels: ClassVar[bool] = True

    def objective(self, model: Model, context: Context) -> Objective:
        return CrossEntropy(self.smoothing)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Fp8AdamW(groups)
