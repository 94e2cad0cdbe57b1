"""fusegpt: blocks whose loss the last tokens show least are fused into the blocks before them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Batches, Choices, Context, Stage, Technique
from martlet.functional.distillation import mean_divergence
from martlet.vit.repair import cut_and_repair_
from martlet.vit.streams import First, Rest
from martlet.vit.structure import record_of, remove_block_, restore_structure_
from martlet.vit.view import VitView, view

IMAGES = 64
"""How many of the calibration images influence is measured on."""
JUDGES = 8
"""One in so many of the calibration images isn't fitted to, and tells whether the fit is worth it."""


@dataclass(frozen=True, kw_only=True)
class FuseGPT(Technique):
    """Take out the blocks whose loss the last tokens show least, and fuse them into the blocks before.

    The macro influence of a block is how far the tokens after the last block turn when it is missing; it is measured
    anew after each removal. The hidden units of a block that goes are offered to the block before it, which keeps as
    many as it had, of both, and is fitted to do the work of both. Whole blocks are what engines like best: nothing is
    left of them. But they are a coarse cut: for the same MACs, `ziplm` loses less.

    Args:
        blocks: how many to take out; 0 takes none.
        fuse: False drops the same blocks and fits nothing, to compare.

    Shape: unchanged; the depth falls.
    Needs: some hundred calibration images, without labels. The first block of each stage stays.
    Cost: at compress time, for each removal half a forward pass of 64 images for each block, and six of all images; at
        run time, blocks that aren't there.
    Paper: Pei et al., FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers, 2024, arXiv 2411.14507:
        macro influence, and fusion in a group of neighbors; from its abstract and official code.
    Differs: the paper adds the removed weights to the neighbors' under learned low-rank coefficients, and trains these
        and low-rank updates on the group's output. Here nothing is trained: units are offered as they are, chosen and
        weighed by least squares on the output of the pair; attention of the removed block is left to that fit. The
        group is the block before. Where what was fitted gives logits further from the whole model's than blocks that
        are only dropped, on images that it wasn't fitted to, they are dropped: some do nothing, and a fit to few
        images does harm. Influence is of patches and class token alike, as in the official code of all tokens.
    Raises: RecipeError for more blocks than can go; SourceError for a model that isn't a vision transformer.
    """

    name: ClassVar[str] = "fusegpt"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "take out the blocks that matter least, and fuse them into their neighbors"
    paper: ClassVar[str] = "Pei et al., FuseGPT: Learnable Layers Fusion, 2024, arXiv 2411.14507"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULE, Fact.ALL_TOKENS, Fact.WHOLE_LINEARS, Fact.ONE_EXIT})
    needs_images: ClassVar[bool] = True

    blocks: int = 1
    fuse: bool = True

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise RecipeError(f"{self.name}: blocks is how many to take out, not {self.blocks}")

    def space(self) -> Choices:
        return Choices(settings={"blocks": (1, 2)})

    def check(self, model: Model) -> None:
        vit = view(model.module)
        most = len(vit.blocks) - len({block.stage for block in vit.blocks})
        if self.blocks > most:
            raise RecipeError(
                f"{self.name}: {self.blocks} of {len(vit.blocks)} blocks can't go; {vit.blocks[0].name}, like the "
                f"first of every stage, has to stay, so at most {most} can"
            )

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        images, before = context.calibration(self), view(model.module)
        removed = list[int]()
        less = copy.deepcopy(model.module)
        for _ in range(self.blocks):
            kept = [i for i in range(len(before.blocks)) if i not in removed]
            found = influence(less, images)
            least = min(found, key=found.__getitem__)
            removed.append(kept[least])
            remove_block_(view(less), least)
            context.progress("choosing blocks", len(removed), self.blocks)
        if self.fuse and removed:
            fused, judges = copy.deepcopy(model.module), First(images, images.num_images // JUDGES)
            rest = Rest(images, judges)
            cut_and_repair_(fused, {}, rest if rest.num_images else judges, removed=removed, progress=context.progress)
            fusion, dropping = losses((fused, less), model.module, judges)
            if fusion < dropping:
                less = fused
        model.module = less
        return record_of(before, [i for i in range(len(before.blocks)) if i not in removed], view(model.module))

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        restore_structure_(model.module, record)


def influence(module: torch.nn.Module, images: Batches) -> dict[int, float]:
    """By block that can go, 1 less the mean cosine of the last block's tokens with and without it."""
    vit = view(module)
    whole = _last_tokens(module, vit, images)
    found = {}
    for number in range(len(vit.blocks)):
        if number == 0 or vit.blocks[number - 1].stage != vit.blocks[number].stage:
            continue
        twin = copy.deepcopy(module)
        remove_block_(view(twin), number)
        without = _last_tokens(twin, view(twin), images)
        cosines = [functional.cosine_similarity(a, b, dim=-1).flatten() for a, b in zip(whole, without, strict=True)]
        found[number] = 1 - float(torch.cat(cosines).mean())
    return found


@torch.no_grad()
def losses(modules: Iterable[torch.nn.Module], whole: torch.nn.Module, images: Batches) -> list[float]:
    """The divergence of the logits of each from those of the whole model, in nats, averaged over images."""
    wanted = [whole(batch) for batch in images]
    return [mean_divergence((module(batch) for batch in images), wanted) for module in modules]


@torch.no_grad()
def _last_tokens(module: torch.nn.Module, vit: VitView, images: Batches) -> list[torch.Tensor]:
    """By batch, of the first IMAGES."""
    found = list[torch.Tensor]()

    def note(_module: torch.nn.Module, _args: object, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    handle = vit.blocks[-1].module.register_forward_hook(note)
    try:
        for batch in First(images, IMAGES):
            module(batch)
    finally:
        handle.remove()
    return found
