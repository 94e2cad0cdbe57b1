"""linear_exits: early exits with a norm and one Linear each, on a model whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from martlet.nn.exit_heads import LinearHead
from martlet.vit.exits import HeadedExits, readout
from martlet.vit.view import VitView


@dataclass(frozen=True, kw_only=True)
class LinearExits(HeadedExits):
    """Let images leave after some of the blocks, with a linear head at each exit; the model's weights stay as they are.

    The plainest exits there are, and the cheapest: what other heads have to beat. No image takes an exit before
    thresholds are set (`deer`).

    Args:
        rate: the highest learning rate, of the heads alone.

    Shape: none changes. The logits are those of the exit at which an image leaves.
    Needs: images; labels are learned from too, where there are any. A vision transformer with two blocks or more.
    Cost: one inference of the model a step and image, and training of the heads; at run time, a norm and a Linear for
        each exit that an image comes to.
    Paper: Teerapittayanon et al., BranchyNet, 2016, arXiv 1709.01686, section III; Hinton et al., 2015,
        arXiv 1503.02531, for what heads learn.
    Differs: the model isn't trained with its exits, so that images that don't leave keep their logits; heads learn the
        model's own probabilities at temperature 2 besides the labels; an image leaves when its largest probability is
        large, not when its entropy is small.
    Raises: RecipeError for blocks that aren't there, a model that has exits, or a setting of training out of range;
        SourceError for a model that is no vision transformer; and as the loop does.
    """

    name: ClassVar[str] = "linear_exits"
    summary: ClassVar[str] = "early exits with linear heads, trained on the frozen model"
    paper: ClassVar[str] = "Teerapittayanon et al., BranchyNet, 2016, arXiv 1709.01686"

    def heads(self, vit: VitView, after: Sequence[int], channels: Sequence[int], classes: int) -> list[nn.Module]:
        return [LinearHead(each, classes, readout(vit, n)) for n, each in zip(after, channels, strict=True)]
