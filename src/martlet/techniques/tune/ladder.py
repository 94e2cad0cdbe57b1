"""ladder: a narrow network beside the model is learned, through which alone gradients flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.nn.side import Rung
from martlet.training.inserted import Inserted
from martlet.vit.view import VitView, view


@dataclass(frozen=True, kw_only=True)
class Ladder(Inserted):
    """Learn a task by a narrow transformer beside the model, that sees what each block gives, and the classifier.

    No gradient flows through the model, so nothing of it is kept for one: the way to tune where memory is short. `lora`
    keeps every activation, costs nothing at run time, and often reaches more.

    Args:
        narrower: how many times fewer features the narrow network has.

    Shape: (B, N, C) to (B, N, C + C / narrower) between blocks, and back.
    Needs: images with labels (`--train`); a plain vision transformer.
    Cost: a step takes an inference of the model and training of the narrow one, and on ViT-Ti keeps a quarter of what
        `finetune` keeps; at run time the narrow network comes on top.
    Paper: Sung et al., LST: Ladder Side-Tuning, 2022, arXiv 2206.06522; held against the official code.
    Differs: the narrow network begins from chance, not from pruned blocks of the model, and none of its blocks is left
        out. What it gives is added to what the model gives before the classifier, from zero on, so that training begins
        at what `probe` has.
    Raises: RecipeError for a setting out of range, images without labels, or a model that has a ladder or is no plain
        ViT; SourceError for one that isn't a transformer; and as the loop does.
    """

    name: ClassVar[str] = "ladder"
    summary: ClassVar[str] = "learn a task by a narrow network beside the model, in little memory"
    paper: ClassVar[str] = "Sung et al., LST: Ladder Side-Tuning, 2022, arXiv 2206.06522"
    layer: ClassVar[type[nn.Module]] = Rung
    learned: ClassVar[tuple[str, ...]] = ("down", "block", "gate", "enter", "leave")

    narrower: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.narrower < 1:
            raise RecipeError(f"ladder: narrower is {self.narrower}; it has to be more than 0")

    def check(self, model: Model) -> None:
        super().check(model)
        width, heads = _shape(view(model.module))
        if width % (self.narrower * heads):
            fits = [n for n in range(1, width // heads + 1) if width % (n * heads) == 0]
            raise RecipeError(
                f"ladder: {model.name} has {width} features in {heads} heads, which {self.narrower} times fewer "
                f"doesn't fit; narrower can be {', '.join(map(str, fits))}"
            )

    def layers(self, vit: VitView) -> Mapping[str, nn.Module]:
        (width, heads), last = _shape(vit), len(vit.blocks) - 1
        return {
            block.name: Rung(block.module, width, width // self.narrower, heads, i == 0, i == last)
            for i, block in enumerate(vit.blocks)
        }


def _shape(vit: VitView) -> tuple[int, int]:
    """Features, and heads of the first block."""
    return vit.blocks[0].mlp.fc2.weight.shape[0], vit.blocks[0].attention.num_heads
