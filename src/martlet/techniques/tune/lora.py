"""lora: beside each Linear two thin ones are learned, and added to it when they are done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.training.low_rank import LowRank
from martlet.training.objective import Objective
from martlet.training.tuning import Tuning, classifiers, linears, peft


@dataclass(frozen=True, kw_only=True)
class Lora(Tuning):
    """Learn a task with an update of low rank for every Linear, and the classifier; merged, nothing of it stays.

    A hundredth of the weights is trained, so optimizer states are small, and few images overfit less. The result is as
    large and as fast as before. With many images, `finetune` reaches more.

    Args:
        rank: of each update.
        alpha: the update is scaled by alpha / rank.

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

    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.alpha > 0:
            raise RecipeError(f"lora: rank is {self.rank} and alpha {self.alpha}; both have to be more than 0")

    def check(self, model: Model) -> None:
        peft("lora")
        linears(model.module, model.num_classes, "lora")

    def objective(self, model: Model, context: Context) -> Objective:
        heads = [*classifiers(model.module, model.num_classes, "lora")]
        names = [*linears(model.module, model.num_classes, "lora")]
        config = peft("lora").LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=names, exclude_modules=heads
        )
        return LowRank(self.smoothing, heads, config)
