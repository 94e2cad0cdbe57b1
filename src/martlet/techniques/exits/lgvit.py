"""lgvit: early exits whose heads are convolutions near the images and attention further on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.nn.exit_heads import AggregationHead, PerceptionHead
from martlet.training.objective import Objective
from martlet.vit.exits import ExitRun, HeadedExits, HeadsObjective, check_grid, readout
from martlet.vit.view import VitView

HEADS = 8
"""Of attention, or the most that divide the channels."""
STRIDES = (2, 3)
"""Of the patches that an aggregation head looks at: those of the first half of these heads, and of the others."""


@dataclass(frozen=True, kw_only=True)
class LGViT(HeadedExits):
    """Let images leave after some of the blocks: the first exits see locally, the others globally.

    Early tokens lack what convolutions find, late ones have it and lack the whole image: so the first half of the exits
    has local perception heads (pointwise and depthwise convolutions over the patches), the other half global
    aggregation heads (attention among every second or third patch down and across). Better than linear heads at a
    slightly higher cost. The paper's first stage is to train the model itself, without exits: `finetune | lgvit`. No
    image takes an exit before thresholds are set (`deer`).

    Args:
        features: weight of the losses that draw the features of heads to those of the last head of their kind, and
            those of the first and last of each kind to the model's last tokens.
        rate: the highest learning rate, of the heads alone.

    Shape: none changes. The logits are those of the exit at which an image leaves.
    Needs: images; labels are learned from too, where there are any. A vision transformer that computes all tokens, on a
        grid, with two blocks or more.
    Cost: one inference of the model a step and image, and training of the heads; at run time, for each exit that an
        image comes to, about 2 C² MACs a patch, or 4 C² for each patch that is looked at.
    Paper: Xu et al., LGViT, 2023, arXiv 2308.00255: section 3.2 (heads), 3.3 (training in two stages, equations 5 to
        10).
    Differs: the equations are known from the authors' code; its arXiv text wasn't at hand. Exits are at the quarters of
        the depth, of which the paper has eight in a row. A class and a distillation token are averaged before one
        classifier, where the code has two. Both kinds of feature loss share one weight, and are means over what is
        compared; features of aggregation heads are compared by their products between channels, divided by the number
        of patches. The target of each is not drawn to the others.
    Raises: RecipeError for blocks that aren't there, a model that has exits, patches without a grid, or a setting of
        training out of range; SourceError for a model that is no vision transformer; and as the loop does.
    """

    name: ClassVar[str] = "lgvit"
    summary: ClassVar[str] = "early exits with local heads first and global heads later, trained on the frozen model"
    paper: ClassVar[str] = (
        "Xu et al., LGViT: Dynamic Early Exiting for Accelerating Vision Transformer, 2023, arXiv 2308.00255"
    )
    requires: ClassVar[frozenset[Fact]] = HeadedExits.requires | {Fact.ALL_TOKENS}

    features: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.features >= 0:
            raise RecipeError(f"lgvit: features is {self.features}; it can't be less than 0")

    def check(self, model: Model) -> None:
        super().check(model)
        check_grid(self.name, model)

    def heads(self, vit: VitView, after: Sequence[int], channels: Sequence[int], classes: int) -> list[nn.Module]:
        local = -(-len(after) // 2)
        found: list[nn.Module] = []
        for i, (n, each) in enumerate(zip(after, channels, strict=True)):
            read = readout(vit, n)
            if i < local:
                found.append(PerceptionHead(each, classes, read, wide=2 * i < local))
            else:
                stride = STRIDES[2 * (i - local) >= len(after) - local]
                num_heads = next(n for n in range(HEADS, 0, -1) if each % n == 0)
                found.append(AggregationHead(each, classes, read, stride, num_heads))
        return found

    def objective(self, model: Model, context: Context) -> Objective:
        return Features(self.features)


class Features(HeadsObjective):
    """The heads' features learn from those of the last of their kind, and of the model."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def more(self, run: ExitRun, seen: Mapping[nn.Module, Tensor], tokens: Sequence[Tensor]) -> Tensor:
        if not self.weight:
            return super().more(run, seen, tokens)
        return self.weight * (alike(run, tokens) + unlike(run, tokens, seen[run.last]))


def alike(run: ExitRun, tokens: Sequence[Tensor]) -> Tensor:
    """How far heads' features are from those of the last head of their kind, summed over the heads."""
    losses = [tokens[0].new_zeros(())]
    for kind in (PerceptionHead, AggregationHead):
        found = [e.head.features(x) for e, x in zip(run.exits, tokens, strict=True) if isinstance(e.head, kind)]
        compared = [_products(each) for each in found] if kind is AggregationHead else found
        losses += [functional.mse_loss(each, compared[-1].detach()) for each in compared[:-1]]
    return torch.stack(losses).sum()


def unlike(run: ExitRun, tokens: Sequence[Tensor], last: Tensor) -> Tensor:
    """How far features of the first and the last head of each kind are from the model's last tokens, as distributions
    over the channels, summed over these heads. Heads on another grid, or of other channels, don't take part."""
    losses = [tokens[0].new_zeros(())]
    for kind in (PerceptionHead, AggregationHead):
        heads = [(e.head, x) for e, x in zip(run.exits, tokens, strict=True) if isinstance(e.head, kind)]
        for head, x in {id(head): (head, x) for head, x in (*heads[:1], *heads[-1:])}.values():
            if x.shape != last.shape:
                continue
            aim = head.sampled(last) if isinstance(head, AggregationHead) else head.readout.split(last)[1]
            found, wanted = (functional.log_softmax(each, -1).flatten(0, 1) for each in (head.features(x), aim))
            losses.append(functional.kl_div(found, wanted, reduction="batchmean", log_target=True))
    return torch.stack(losses).sum()


def _products(features: Tensor) -> Tensor:
    """(B, M, C) -> (B, C, C), which doesn't depend on how many patches were looked at."""
    return features.mT @ features / features.shape[1]
