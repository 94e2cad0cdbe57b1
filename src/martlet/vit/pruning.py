"""What all techniques share that prune structure: the ratio, the allocation, the cut, its repair, and the record."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from martlet.core.errors import RecipeError, nearest
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.vit.budget import KINDS, SIZES, Kind, Levels, allocate, total_macs, works
from martlet.vit.repair import Cut, cut_, cut_and_repair_
from martlet.vit.structure import BlockShape, check_attention, record_of, restore_structure_, shape_of
from martlet.vit.view import VitView, view

__all__ = ["Kind", "Levels", "Pruning", "ScoredPruning", "Scores", "cuts_of"]

Scores = Mapping[tuple[int, Kind], Tensor]
"""By block and kind, what is lost with each unit: heads (H,), qk (H, D), v (H, E), hidden (U,)."""


@dataclass(frozen=True, kw_only=True)
class Pruning(Technique):
    """What all techniques share that leave a smaller, dense model.

    Args:
        prune_ratio: share of the model's MACs to remove, attention's products counted; 0 removes nothing.
        groups: what may be cut: `heads`, `qk` (dimensions of each head's queries and keys), `v` (of its values),
            `hidden` (units of MLPs).
        multiple: sizes that are left are multiples of it: dimensions of heads, and hidden units. Kernels work on so
            many at once: with multiples of 8 of them a ViT-Ti saves less time for each MAC. Heads of as many dimensions
            or fewer stay.
    """

    stage: ClassVar[Stage] = Stage.MODULE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULE, Fact.ALL_TOKENS, Fact.WHOLE_LINEARS, Fact.ONE_EXIT})
    needs_images: ClassVar[bool] = True

    prune_ratio: float = 0.2
    groups: tuple[str, ...] = ("qk", "v", "hidden")
    multiple: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not 0 <= self.prune_ratio < 1:
            raise RecipeError(
                f"{self.name}: prune_ratio is the share of MACs to remove, from 0 to less than 1, "
                f"not {self.prune_ratio}"
            )
        for group in self.groups:
            if group not in KINDS:
                known = ", ".join(KINDS)
                raise RecipeError(
                    f"{self.name}: there is no group {group!r}{nearest(str(group), KINDS)} (known: {known})"
                )
        if not self.groups:
            raise RecipeError(f"{self.name}: groups names nothing to cut; say one of {', '.join(KINDS)}")
        if self.multiple < 1:
            raise RecipeError(f"{self.name}: multiple is at least 1, not {self.multiple}")

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        return settings | {"groups": list(self.groups)} if "groups" in settings else settings

    def check(self, model: Model) -> None:
        self.cuttable(view(model.module))

    @abstractmethod
    def cuts(self, model: Model, vit: VitView, context: Context, total: int) -> dict[int, Cut]:
        """What is to be left of which blocks. total: MACs of the model."""

    def cut_(self, model: Model, vit: VitView, cuts: Mapping[int, Cut], context: Context) -> None:
        cut_and_repair_(model.module, cuts, context.calibration(self), progress=context.progress)

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        before = view(model.module)
        kept = [*range(len(before.blocks))]
        if self.needs_images:
            context.calibration(self)
        if self.prune_ratio:
            cuts = self.cuts(model, before, context, total_macs(model))
            if cuts:
                self.cut_(model, before, cuts, context)
        return record_of(before, kept, view(model.module))

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        restore_structure_(model.module, record)

    def cuttable(self, vit: VitView) -> list[tuple[int, Kind]]:
        """Every block and kind of cut. Groups that were left at their default are left out where they can't be cut.

        Raises:
            RecipeError: a group that was asked for can't be cut in some block.
        """
        found = list[tuple[int, Kind]]()
        kinds: list[Kind] = [kind for kind in KINDS if kind in self.groups]
        asked = "groups" in self.settings()
        for i, block in enumerate(vit.blocks):
            for kind in kinds:
                if kind != "hidden":
                    try:
                        check_attention(vit, block, self.name, kind)
                    except RecipeError:
                        if asked:
                            raise
                        continue
                found.append((i, kind))
        return found

    def sizes_left(self, shape: BlockShape, kind: Kind) -> list[int]:
        """Those that a cut of this kind may leave, the greatest first."""
        now = getattr(shape, SIZES[kind])
        step = 1 if kind == "heads" else self.multiple
        return [*range((now - 1) // step * step, 0, -step)]


@dataclass(frozen=True, kw_only=True)
class ScoredPruning(Pruning):
    """What prunes by a score of every unit: the least of all go first, for each MAC that they save.

    Args:
        repair: refit what stays to the calibration images, in closed form; False only cuts.
    """

    repair: bool = True

    @abstractmethod
    def scores(self, model: Model, vit: VitView, context: Context) -> Scores:
        """Of all that `cuttable` names, comparable between blocks and kinds."""

    def cuts(self, model: Model, vit: VitView, context: Context, total: int) -> dict[int, Cut]:
        scores = self.scores(model, vit, context)
        losses = {
            key: {left: _lost(score, left) for left in self.sizes_left(shape_of(vit.blocks[key[0]]), key[1])}
            for key, score in scores.items()
        }
        shapes = allocate(self.name, vit, works(model, vit), losses, self.prune_ratio, total)
        return cuts_of(vit, shapes, scores)

    def cut_(self, model: Model, vit: VitView, cuts: Mapping[int, Cut], context: Context) -> None:
        if self.repair:
            super().cut_(model, vit, cuts, context)
        else:
            cut_(model.module, cuts)


def cuts_of(vit: VitView, shapes: Sequence[BlockShape], scores: Scores) -> dict[int, Cut]:
    """Of each block that gets smaller, the units of the greatest scores."""
    return {
        i: _numbers(i, shape, shape_of(block), scores)
        for i, (shape, block) in enumerate(zip(shapes, vit.blocks, strict=True))
        if shape != shape_of(block)
    }


def _lost(score: Tensor, left: int) -> float:
    """The sum of the least scores, of each head if there are heads, until so many are left."""
    return float(score.double().sort(-1).values[..., : score.shape[-1] - left].sum())


def _best(score: Tensor, left: int) -> Tensor:
    """The numbers of the greatest scores, ascending: (left,) of (U,), or (H, left) of (H, D)."""
    return score.topk(left, -1).indices.sort(-1).values


def _numbers(i: int, shape: BlockShape, now: BlockShape, scores: Scores) -> Cut:
    """What stays, by number."""
    heads = hidden = None
    if shape.num_heads < now.num_heads:
        heads = _best(scores[i, "heads"], shape.num_heads)
    by_head: dict[str, Tensor | None] = {}
    for kind, left, size in (("qk", shape.qk_dim, now.qk_dim), ("v", shape.v_dim, now.v_dim)):
        score = scores[i, kind] if left < size else None  # type: ignore[index]
        if score is not None and heads is not None:
            score = score[heads]
        by_head[kind] = None if score is None else _best(score, left)
    if shape.hidden < now.hidden:
        hidden = _best(scores[i, "hidden"], shape.hidden)
    return Cut(shape, heads, by_head["qk"], by_head["v"], hidden)
