"""nvit: one ranking of heads, their dimensions and hidden units of all blocks, by curvature and by latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.vit.budget import SIZES, Kind, Work, works
from martlet.vit.gradients import contributions
from martlet.vit.latency_law import LatencyLaw, read_law
from martlet.vit.pruning import ScoredPruning, Scores, cuts_of
from martlet.vit.repair import Cut
from martlet.vit.structure import BlockShape, shape_of
from martlet.vit.view import VitView


@dataclass(frozen=True, kw_only=True)
class NViT(ScoredPruning):
    """Rank heads, their dimensions and hidden units of all blocks together, and cut the least until few MACs are left.

    The saliency of a group of weights is the square of the sum of weight times gradient, which stands for the rise of
    the loss by its Hessian, so that groups of every kind compare; of it, what a cut saves of latency is taken off. The
    ranking is right for a model that is trained between and after cuts. Without training, `ziplm` loses less.

    Args:
        groups: of `heads`, `qk`, `v` and `hidden`.
        latency_table: a JSON file of blocks measured on the engine (`benchmarks/prune.py --parts table`); without one,
            latency goes by MACs.
        latency_regularization: how much the share of the model's latency that a cut saves takes off its share of all
            saliency; 0 ranks by saliency alone.

    Shape: unchanged outside; heads, their dimensions and hidden units inside.
    Needs: calibration images, without labels, and memory for gradients of one batch.
    Cost: at compress time, one forward and backward pass of the images, and six forward passes for the repair; at run
        time, less than before.
    Paper: Yang et al., Global Vision Transformer Pruning with Hessian-Aware Saliency, 2023, arXiv 2110.04869:
        saliency, and its latency-aware form; from its abstract and official code.
    Differs: one step, with a closed-form repair, where the paper prunes little by little in training. Without labels,
        the loss is the cross entropy with the model's own classes. The width is left as it is. Saliency and latency are
        shares of the model's, so that one weight of the regularization serves all models; the official code takes
        raw numbers, and 5e-4. The table is fitted by a law of five terms in place of a lookup. The budget is MACs.
    Raises: RecipeError for a table of another engine or machine, a ratio that would empty layers, or a group that the
        model can't cut; SourceError for a model that isn't a vision transformer.
    """

    name: ClassVar[str] = "nvit"
    summary: ClassVar[str] = "cut what one ranking by curvature and latency puts last"
    paper: ClassVar[str] = "Yang et al., Global Vision Transformer Pruning (NViT), 2023, arXiv 2110.04869"

    groups: tuple[str, ...] = ("heads", "qk", "v", "hidden")
    latency_table: str = ""
    latency_regularization: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latency_regularization < 0:
            raise RecipeError(f"{self.name}: latency_regularization is at least 0, not {self.latency_regularization}")

    def check_engine(self, context: Context) -> None:
        if self.latency_table:
            read_law(self.latency_table, self.name, context.engine)

    def scores(self, model: Model, vit: VitView, context: Context) -> Scores:
        images, totals = context.calibration(self), dict[tuple[int, Kind], Tensor]()
        for found in contributions(model.module, images, self.cuttable(vit), absolute=False, progress=context.progress):
            for key, value in found.items():
                share = value / 2 if key[1] == "qk" else value  # two maps, where all others count one
                totals[key] = totals.get(key, 0) + share.square()
        return totals

    def cuts(self, model: Model, vit: VitView, context: Context, total: int) -> dict[int, Cut]:
        scores, each = self.scores(model, vit, context), works(model, vit)
        law = read_law(self.latency_table, self.name, context.engine) if self.latency_table else None
        shapes = self._rank(vit, scores, each, law, total)
        return cuts_of(vit, shapes, scores)

    def _rank(
        self, vit: VitView, scores: Scores, each: list[Work], law: LatencyLaw | None, total: int
    ) -> list[BlockShape]:
        """The sizes that are left when always the group of the least latency-aware saliency went."""
        whole = [shape_of(block) for block in vit.blocks]
        shapes, sums = list(whole), {key: ranked(score) for key, score in scores.items()}
        latency = [law or work.macs for work in each]
        all_latency = sum(f(shape) for f, shape in zip(latency, whole, strict=True))
        all_saliency = sum(float(score.sum()) for key, score in scores.items() if key[1] != "heads") or 1.0
        need = self.prune_ratio * total
        while sum(w.macs(a) - w.macs(b) for w, a, b in zip(each, whole, shapes, strict=True)) < need:
            found = []
            for (i, kind), saliency in sums.items():
                left = next(iter(self.sizes_left(shapes[i], kind)), 0)
                if left:
                    after = replace(shapes[i], **{SIZES[kind]: left})
                    now = getattr(shapes[i], SIZES[kind])
                    lost = sum(saliency[now - 1 - n] for n in range(now - left)) / all_saliency
                    saved = (latency[i](shapes[i]) - latency[i](after)) / all_latency
                    found.append((lost - self.latency_regularization * saved, i, kind, after))
            if not found:
                raise RecipeError(
                    f"{self.name}: prune_ratio {self.prune_ratio:g} would empty layers such as those of "
                    f"{vit.blocks[0].name}; ask for less"
                )
            _, i, _, after = min(found, key=lambda each: each[:3])
            shapes[i] = after
        return shapes


def ranked(score: Tensor) -> Mapping[int, float]:
    """Saliency by how many are left with it: that of the best unit is number 0. Of dimensions, over all heads."""
    best = score.sort(-1, descending=True).values
    return dict(enumerate((best if best.ndim == 1 else best.sum(0)).tolist()))
