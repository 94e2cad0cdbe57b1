"""vpt: tokens that are learned are shown to each block, and taken away behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from martlet.core import store
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.nn.side import Prompted
from martlet.source import checkpoint
from martlet.training.inserted import Inserted
from martlet.vit.view import VitView, view


@dataclass(frozen=True, kw_only=True)
class Vpt(Inserted):
    """Learn a task by prompts, a few tokens that each block sees beside the image's, and the classifier.

    With very few labels prompts from chance hardly learn; those of an earlier task (`start`) do, which is PVP: train
    them on many images of another task first, then give the artifact of that.

    Args:
        prompts: tokens a block.
        start: an artifact whose prompts to begin from, as wide and as many; empty begins from chance.

    Shape: (B, N, C) to (B, N + prompts, C) inside of each block, and back.
    Needs: images with labels (`--train`); a plain vision transformer.
    Cost: a step about as of `finetune`, with few moments; at run time as many tokens more in each block.
    Paper: Jia et al., Visual Prompt Tuning, 2022, arXiv 2203.12119, VPT-Deep, whose text wasn't read again;
        Song et al., PVP, 2023, for `start`, of which the abstract alone was at hand.
    Differs: prompts begin as a truncated normal of 0.02, as tokens do in timm, where VPT's spread follows from the
        patch's size.
    Raises: RecipeError for a setting out of range, images without labels, or a model that has prompts or is no plain
        ViT; SourceError for one that isn't a transformer; ArtifactError for a start that is none; and as the loop does.
    """

    name: ClassVar[str] = "vpt"
    summary: ClassVar[str] = "learn a task by tokens that each block sees beside the image's"
    paper: ClassVar[str] = "Jia et al., Visual Prompt Tuning, 2022, arXiv 2203.12119"
    layer: ClassVar[type[nn.Module]] = Prompted
    learned: ClassVar[tuple[str, ...]] = ("prompts",)

    prompts: int = 10
    start: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts < 1:
            raise RecipeError(f"vpt: prompts is {self.prompts}; it has to be more than 0")

    def check(self, model: Model) -> None:
        super().check(model)
        if self.start:
            found, wanted = _prompts(self.start), self.layers(view(model.module))
            shapes = {f"{name}.prompts": tuple(layer.prompts.shape) for name, layer in wanted.items()}
            if {name: tuple(tensor.shape) for name, tensor in found.items()} != shapes:
                have = ", ".join(str(tuple(tensor.shape)) for tensor in found.values()) or "none"
                raise RecipeError(
                    f"vpt: {self.start} has the prompts {have}, and {model.name} takes {len(shapes)} of "
                    f"{next(iter(shapes.values()))}, by block"
                )

    def begin_(self, model: Model) -> None:
        if self.start:
            model.module.load_state_dict(_prompts(self.start), strict=False)

    def layers(self, vit: VitView) -> Mapping[str, Prompted]:
        prefix = vit.tokens.num_prefix
        return {
            block.name: Prompted(block.module, block.mlp.fc2.weight.shape[0], self.prompts, prefix)
            for block in vit.blocks
        }


def _prompts(artifact: str) -> dict[str, Tensor]:
    """By name, those that an artifact has.

    Raises:
        MartletError: it is no artifact, or damaged.
    """
    state = checkpoint.read(store.load(artifact).path / store.WEIGHTS)
    return {name: tensor for name, tensor in state.items() if name.endswith(".prompts")}
