"""sherl: what early blocks give is gathered beside the model, and late blocks make of it what the task needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.nn.side import Tier
from martlet.training.inserted import Inserted
from martlet.vit.view import VitView, view


@dataclass(frozen=True, kw_only=True)
class Sherl(Inserted):
    """Learn a task by thin Linears that read each early block, and by what the last blocks make of that.

    All that early blocks give is brought to a few features and weighed token by token, what repeats others counting
    less; the sum is added to what the last blocks get. Gradients flow through these alone, which stay as they are. In
    about as little memory as `ladder`, and the knowledge of late blocks is used.

    Args:
        narrower: how many times fewer features what is gathered has.
        late: blocks at the end that gradients flow through.
        spreads: features that repeat others count less; False leaves that out.

    Shape: (B, N, C) to (B, N, C + L C / narrower) behind the early block L, and back.
    Needs: images with labels (`--train`); a plain vision transformer.
    Cost: a step takes an inference of the model and training of its last blocks; at run time a thin Linear more in
        each early block.
    Paper: Diao et al., SHERL, 2024, arXiv 2407.07523, whose text wasn't at hand; held against the official code for
        transformers.
    Differs: what is gathered is added to what the last blocks get, from zero on, so that training begins at what
        `probe` has, where the official code has a learned gate, a norm and dropout there.
    Raises: RecipeError for a setting out of range, images without labels, or a model that has such layers, too few
        blocks, or is no plain ViT; SourceError for one that isn't a transformer; and as the loop does.
    """

    name: ClassVar[str] = "sherl"
    summary: ClassVar[str] = "learn a task by what early blocks give and late ones make of it, in little memory"
    paper: ClassVar[str] = "Diao et al., SHERL, 2024, arXiv 2407.07523"
    layer: ClassVar[type[nn.Module]] = Tier
    learned: ClassVar[tuple[str, ...]] = ("enter", "down", "attend", "leave")

    narrower: int = 8
    late: int = 1
    spreads: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("narrower", "late"):
            if getattr(self, name) < 1:
                raise RecipeError(f"sherl: {name} is {getattr(self, name)}; it has to be more than 0")

    def check(self, model: Model) -> None:
        super().check(model)
        vit = view(model.module)
        width, depth = vit.blocks[0].mlp.fc2.weight.shape[0], len(vit.blocks)
        if depth <= self.late:
            raise RecipeError(f"sherl: {model.name} has {depth} blocks, which leaves none before {self.late} late ones")
        if self.narrower > width:
            raise RecipeError(f"sherl: {model.name} has {width} features; narrower can be 1 to {width}")

    def layers(self, vit: VitView) -> Mapping[str, nn.Module]:
        width, early = vit.blocks[0].mlp.fc2.weight.shape[0], vit.blocks[: len(vit.blocks) - self.late]
        return {
            block.name: Tier(block.module, width, width // self.narrower, i == 0, block is early[-1], self.spreads)
            for i, block in enumerate(early)
        }
