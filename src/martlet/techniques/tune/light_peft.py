"""light_peft: a few steps of lora tell which heads, hidden units and updates a task needs; the others are cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.training.early import Early, best
from martlet.training.loop import train_
from martlet.training.low_rank import LowRank, LowRankTuning
from martlet.training.tuning import classifiers, linears
from martlet.vit.repair import Cut, cut_and_repair_
from martlet.vit.structure import check_attention, record_of, restore_structure_, shape_of
from martlet.vit.view import BlockView, VitView, view

IMAGES = 512
"""That what is left is fitted to."""
MAPS = ("query", "key", "value", "proj")


@dataclass(frozen=True, kw_only=True)
class LightPeft(LowRankTuning):
    """Learn a task as `lora` does, on a model that is cut to what the task needs after the first steps.

    In these, masks of heads and hidden units are learned along, which a penalty draws to zero; and of each update it is
    kept how large it is beside what it is added to, and how its ranks weigh in the loss. Heads and units of the least
    masks are then cut, and so are the least updates, and ranks of those that are left; what is left of each block is
    refitted to what the whole one gave. The rest of the training, and the result, are smaller and faster, and it is
    there that `ema` and `patience` count. To cut a model whose task stays, `ziplm` loses less.

    Args:
        early: the share of the steps after which it is cut.
        prune_ratio: share of the heads of each block, and of all hidden units.
        module_ratio: share of the updates that are cut.
        rank_ratio: share of the ranks of those that are left.
        sparsity: how much the sum of all masks weighs in the loss.
        multiple: hidden units that are left in a block are a multiple of it.

    Shape: unchanged outside; heads and hidden units inside.
    Needs: images with labels (`--train`); a vision transformer; the peft library.
    Cost: early steps take as long as of `lora`, later ones as much less as was cut, and between them some 500 images go
        through the model six times; at run time less than before.
    Paper: Gu et al., Light-PEFT, 2024, arXiv 2406.03792, whose text wasn't at hand; held against the official code.
    Differs: the masks are multiplied into the weights, and so is what the updates that are left have learned, beside
        which new ones begin; the official code trains these and the masks on, and refits nothing: on ViT-Ti at 64
        pixels, cut by 40 % and tuned to CIFAR-10, top-1 was 44.4 % without refitting and 51.8 % with. A block keeps one
        head and `multiple` units at least.
    Raises: RecipeError for a setting out of range, images without labels, or attention that can't be cut; SourceError
        for a model that isn't a vision transformer; UsageError without peft; and as the loop does.
    """

    name: ClassVar[str] = "light_peft"
    summary: ClassVar[str] = "learn a task as lora does, on a model that is cut to it early"
    paper: ClassVar[str] = "Gu et al., Light-PEFT, 2024, arXiv 2406.03792"
    requires: ClassVar[frozenset[Fact]] = LowRankTuning.requires | {Fact.ALL_TOKENS, Fact.WHOLE_LINEARS}

    early: float = 0.1
    prune_ratio: float = 0.4
    module_ratio: float = 0.5
    rank_ratio: float = 0.5
    sparsity: float = 1e-4
    multiple: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.early < 1:
            raise RecipeError(f"light_peft: early is {self.early}; it can be more than 0 and less than 1")
        for name in ("prune_ratio", "module_ratio", "rank_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"light_peft: {name} is {getattr(self, name)}; it is from 0 to less than 1")
        if not self.sparsity >= 0:
            raise RecipeError(f"light_peft: sparsity is {self.sparsity}; it can't be less than 0")
        if self.multiple < 1:
            raise RecipeError(f"light_peft: multiple is {self.multiple}; it has to be more than 0")

    def check(self, model: Model) -> None:
        super().check(model)
        vit, found = view(model.module), linears(model.module, model.num_classes, "light_peft")
        for block in vit.blocks:
            check_attention(vit, block, "light_peft", "heads")
            for part in (block.attention.proj, block.mlp.fc2):
                if part.name not in found:
                    raise RecipeError(f"light_peft: {part.name} of {model.name} isn't called by its owner; use `lora`")

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        examples, before = self.examples(model, context), view(model.module)
        heads = [*classifiers(model.module, model.num_classes, "light_peft")]
        ratios = self.sparsity, self.module_ratio, self.rank_ratio
        early = Early(self.smoothing, heads, self.config(model), *ratios)
        first = train_(model, early, examples, replace(self._part(self.early), ema=0.0, patience=0), context)
        names = _names(before.blocks)
        chosen = cuts(before, [*early.head_masks], [*early.unit_masks], self.prune_ratio, self.multiple)
        if chosen:
            images = examples.batches(IMAGES, context.seed)
            cut_and_repair_(model.module, chosen, images, progress=context.progress)
        after = view(model.module)
        now = dict(zip(names, _names(after.blocks), strict=True))
        ranks: dict[str, int] = {}
        for name, rank in early.kept.items():
            name = now.get(name, name)
            ranks[name] = max(rank, ranks.get(name, 0))
        low_rank = LowRank(self.smoothing, heads, self.config(model, ranks))
        record = train_(model, low_rank, examples, self._part(1 - self.early), context)
        structure = record_of(before, [*range(len(before.blocks))], after)
        return record | {"early": first, "ranks": ranks, "structure": structure}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        restore_structure_(model.module, record["structure"])

    def _part(self, share: float) -> LightPeft:
        """The schedule of a share of the training."""
        return replace(self, epochs=self.epochs * share, minutes=self.minutes * share)


def cuts(
    vit: VitView, head_masks: Sequence[Tensor], unit_masks: Sequence[Tensor], ratio: float, multiple: int
) -> dict[int, Cut]:
    """What is left of each block: of heads as many in each, and of hidden units those of the greatest masks of all."""
    every = torch.cat([mask.detach() for mask in unit_masks])
    chosen = torch.zeros(len(every), dtype=torch.bool)
    chosen[best(every.cpu(), ratio)] = True
    counts = [int(part.sum()) for part in chosen.split([len(mask) for mask in unit_masks])]
    found = {}
    for i, (block, heads, units, count) in enumerate(zip(vit.blocks, head_masks, unit_masks, counts, strict=True)):
        shape = shape_of(block)
        left = best(heads.detach().cpu(), ratio)
        hidden = count if count == shape.hidden else max(round(count / multiple), 1) * multiple
        hidden = min(hidden, shape.hidden)
        kept = units.detach().cpu().topk(hidden).indices.sort().values
        new = replace(shape, num_heads=len(left), hidden=hidden)
        if new != shape:
            found[i] = Cut(new, left if new.num_heads < shape.num_heads else None, hidden=kept)
    return found


def _names(blocks: Sequence[BlockView]) -> list[str]:
    """Of every Linear of the blocks, in an order of its own."""
    return [
        part.name
        for block in blocks
        for part in (*(getattr(block.attention, name) for name in MAPS), block.mlp.fc1, block.mlp.gate, block.mlp.fc2)
        if part is not None
    ]
