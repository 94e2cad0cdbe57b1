"""lora: beside each Linear two thin ones are learned, and added to it when they are done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from martlet.training.low_rank import LowRankTuning


@dataclass(frozen=True, kw_only=True)
class Lora(LowRankTuning):
    """Learn a task with an update of low rank for every Linear, and the classifier; merged, nothing of it stays.

    A hundredth of the weights is trained, so optimizer states are small, and few images overfit less. The result is as
    large and as fast as before. With many images, `finetune` reaches more.

    Shape: none changes.
    Needs: images with labels (`--train`); the peft library.
    Cost: a step takes about as long as of `finetune`, with fewer moments to keep; nothing at run time.
    Paper: Hu et al., LoRA, 2022, arXiv 2106.09685; by the peft library.
    Differs: all Linears but the classifier get an update, where the paper takes query and value alone.
    Raises: RecipeError for a setting out of range, images without labels, or a model without such Linears; UsageError
        without peft; and as the loop does.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "learn a task by updates of low rank, which are merged into the weights"
    paper: ClassVar[str] = "Hu et al., LoRA, 2022, arXiv 2106.09685"
