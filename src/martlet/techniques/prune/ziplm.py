"""ziplm: what is cut is what the rest can best replace, and how much where is measured on the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Choices, Context
from martlet.vit.budget import SIZES, Cost, Kind, allocate, between, works
from martlet.vit.latency_law import read_law
from martlet.vit.pruning import Levels, Pruning
from martlet.vit.repair import Cut
from martlet.vit.sensitivity import Key, measured_losses
from martlet.vit.streams import First
from martlet.vit.structure import BlockShape, shape_of
from martlet.vit.view import VitView

SHARES = (0.83, 0.67, 0.5, 0.375, 0.25, 0.125)
"""What is left of a size where its loss is measured."""
IMAGES = 48
"""How many of the calibration images losses are measured on."""
FITTED = 200
"""How many of them the cuts are fitted to whose losses are measured; those that are made are fitted to all."""


@dataclass(frozen=True, kw_only=True)
class ZipLM(Pruning):
    """Cut what the rest can replace, as much in each block as costs the logits least, and repair in closed form.

    Every kind of cut is tried in every block at six sizes, each with its own repair, and the divergence of the logits
    is measured; then always that cut is taken which loses least for each MAC it saves. The cuts are made block by
    block, each fitted to what the blocks before it now give. The best that Martlet knows without training; with labels
    and hours to train, the cut matters less.

    Args:
        prune_ratio: share of the model's MACs to remove, attention's products counted; 0 removes nothing.
        groups: of `qk`, `v` and `hidden`; whole heads only go as their dimensions do.
        latency_table: a JSON file of blocks measured on the engine (`benchmarks/prune.py --parts table`). With it the
            ratio is a share of the time that all blocks take there, and cuts are priced by the milliseconds they save
            (latency-driven slimming); without one, both go by MACs.

    Shape: unchanged outside; dimensions of heads, and hidden units inside.
    Needs: some hundred calibration images, without labels.
    Cost: at compress time, some ten forward passes of 48 images for each block, and six of all; memory for the tokens
        of all images, twice. At run time, less than before.
    Paper: Kurtic, Frantar and Alistarh, ZipLM: Inference-Aware Structured Pruning of Language Models, 2023, arXiv
        2302.04089: removal of columns by the optimal brain surgeon, for units of MLPs; levels for each layer, and a
        choice among them under a budget. Removing always what loses least for each millisecond of a
        measured table: latency-driven slimming of Li et al., EfficientFormer, 2022, arXiv 2206.01191, by its abstract.
    Differs: written without the papers' text at hand. Times of blocks follow from a law fitted to a table of ten, and
        no supernet is trained that says what blocks matter, as EfficientFormer does. Dimensions of attention go in the
        coordinates in which they lose least, and not as whole heads: what is left of q kᵀ is its best approximation of
        that rank, and so for v with proj. Losses of levels are measured divergences of logits that are added up, where
        the paper searches over weights for layerwise errors. Targets of the repair are the whole model's tokens, where
        the paper's are those of the model before the step, and errors of tokens count as the loss's gradient says.
        Nothing is distilled or trained.
    Raises: RecipeError for a ratio that would empty layers, a group that the model can't cut, or a table of another
        engine or machine; SourceError for a model that isn't a vision transformer.
    """

    name: ClassVar[str] = "ziplm"
    summary: ClassVar[str] = "cut the dimensions and hidden units that the rest can replace best"
    paper: ClassVar[str] = "Kurtic et al., ZipLM: Inference-Aware Structured Pruning, 2023, arXiv 2302.04089"

    latency_table: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "heads" in self.groups:
            raise RecipeError(f"{self.name}: groups can be qk, v and hidden; a head goes as its dimensions do")

    def check_engine(self, context: Context) -> None:
        if self.latency_table:
            read_law(self.latency_table, self.name, context.engine)

    def space(self) -> Choices:
        return Choices(settings={"prune_ratio": (0.1, 0.2, 0.3)})

    def cuts(self, model: Model, vit: VitView, context: Context, total: int) -> dict[int, Cut]:
        images = First(context.calibration(self), FITTED)
        keys = self.cuttable(vit)
        levels: dict[Key, list[int]] = {(i, kind): self._levels(shape_of(vit.blocks[i]), kind) for i, kind in keys}
        measured = measured_losses(model.module, levels, images, IMAGES, progress=context.progress)
        losses: dict[Key, Levels] = {
            (i, kind): between(
                {getattr(shape_of(vit.blocks[i]), SIZES[kind]): 0.0, **found},
                self.sizes_left(shape_of(vit.blocks[i]), kind),
            )
            for (i, kind), found in measured.items()
        }
        each: Sequence[Cost] = works(model, vit)
        whole: float = total
        if self.latency_table:
            each = [read_law(self.latency_table, self.name, context.engine)] * len(vit.blocks)
            whole = sum(cost(shape_of(block)) for cost, block in zip(each, vit.blocks, strict=True))
        shapes = allocate(self.name, vit, each, losses, self.prune_ratio, whole)
        return {
            i: Cut(shape)
            for i, (shape, block) in enumerate(zip(shapes, vit.blocks, strict=True))
            if shape != shape_of(block)
        }

    def _levels(self, shape: BlockShape, kind: Kind) -> list[int]:
        """Sizes to measure, of those that may be left."""
        allowed, now = self.sizes_left(shape, kind), getattr(shape, SIZES[kind])
        return sorted(
            {min(allowed, key=lambda left: abs(left - share * now)) for share in SHARES if allowed}, reverse=True
        )
