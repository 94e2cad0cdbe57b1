"""bitfit: biases and the classifier are learned, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from martlet.training.tuning import Tuning


@dataclass(frozen=True, kw_only=True)
class BitFit(Tuning):
    """Learn a task by the model's biases and its classifier, a thousandth of its weights.

    A checkpoint of the task is a few kilobytes. `lora` reaches more.

    Shape: none changes.
    Needs: images with labels (`--train`).
    Cost: a step is cheaper than of `finetune` by the gradients of weights; nothing at run time.
    Paper: Ben Zaken et al., BitFit, 2022, arXiv 2106.10199.
    Differs: nothing known; the text wasn't read again.
    Raises: RecipeError for a setting out of range, or images without labels; and as the loop does.
    """

    name: ClassVar[str] = "bitfit"
    summary: ClassVar[str] = "learn a task by biases and the classifier alone"
    paper: ClassVar[str] = "Ben Zaken et al., BitFit, 2022, arXiv 2106.10199"

    def chosen(self, name: str, parameter: nn.Parameter) -> bool:
        return name.rpartition(".")[2].endswith("bias")
