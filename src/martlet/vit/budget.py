"""What a block costs by its sizes, and which sizes to give to each, so that a model does a share of its MACs less."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.vit.reading import logits_of_noise
from martlet.vit.structure import BlockShape, shape_of
from martlet.vit.view import VitView

Kind = Literal["heads", "qk", "v", "hidden"]
KINDS: tuple[Kind, ...] = ("heads", "qk", "v", "hidden")
SIZES: Mapping[Kind, str] = {"heads": "num_heads", "qk": "qk_dim", "v": "v_dim", "hidden": "hidden"}
"""Which size of a `BlockShape` a kind of cut makes smaller."""


@dataclass(frozen=True)
class Work:
    """What the MACs of a block depend on besides its sizes, for one image.

    rows, mlp_rows: tokens that go through the Linears of attention, padding of windows included, and of the MLP.
    keys: tokens that each query sees. width: C. mlp_maps: Linears of the MLP; with a gate, three.
    """

    rows: int
    keys: int
    mlp_rows: int
    width: int
    mlp_maps: int

    def __call__(self, shape: BlockShape) -> int:
        return self.macs(shape)

    def macs(self, shape: BlockShape) -> int:
        by_head = 2 * (shape.qk_dim + shape.v_dim) * self.width + (shape.qk_dim + shape.v_dim) * self.keys
        return self.rows * shape.num_heads * by_head + self.mlp_rows * self.width * self.mlp_maps * shape.hidden


Cost = Callable[[BlockShape], float]
"""What a block of some sizes costs: MACs (`Work`), or measured milliseconds (`martlet.vit.latency_law.LatencyLaw`)."""


def works(model: Model, vit: VitView) -> list[Work]:
    """Of each block, found by running the model on one image."""
    attention: dict[int, torch.Size] = {}
    mlp: dict[int, torch.Size] = {}
    handles = []
    for i, block in enumerate(vit.blocks):
        for module, seen in ((block.attention.module, attention), (block.mlp.module, mlp)):
            handles.append(module.register_forward_pre_hook(_sees(seen, i), with_kwargs=True))
    try:
        logits_of_noise(model)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for i, block in enumerate(vit.blocks):
        rows = attention[i][:-1].numel()
        window = block.attention.window
        keys = attention[i][1] if window is None else window.size[0] * window.size[1]
        maps = 3 if block.mlp.is_gated else 2
        found.append(Work(rows, keys, mlp[i][:-1].numel(), block.attention.query.weight.shape[1], maps))
    return found


def _sees(seen: dict[int, torch.Size], i: int):
    def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen[i] = (args[0] if args else kwargs["hidden_states"]).shape

    return hook


def total_macs(model: Model) -> int:
    """Of the whole model for one image, attention's products included."""
    from martlet.measure.macs import macs_run

    return macs_run(copy.deepcopy(model.module).to("meta").eval(), model.preprocess.size)


Levels = Mapping[int, float]
"""Loss by size that is left, for sizes smaller than what there is."""


class Step(NamedTuple):
    """One cut that could be made next: what it loses for each MAC or millisecond that it saves."""

    price: float
    block: int
    kind: Kind
    left: int


def between(measured: Levels, sizes: Sequence[int]) -> Levels:
    """Losses of more sizes, on straight lines between those measured; of sizes below the smallest, none."""
    known = sorted(measured)
    found = {}
    for size in sizes:
        above = bisect.bisect_left(known, size)
        if known[0] <= size <= known[-1]:
            upper = known[above]
            lower = size if upper == size else known[above - 1]
            share = 0.0 if upper == lower else (upper - size) / (upper - lower)
            found[size] = measured[upper] + share * (measured[lower] - measured[upper])
    return found


def allocate(
    technique: str,
    vit: VitView,
    each: Sequence[Cost],
    losses: Mapping[tuple[int, Kind], Levels],
    prune_ratio: float,
    total: float,
) -> list[BlockShape]:
    """The sizes of every block, by always cutting next what loses least for what it saves.

    each: what a block of some sizes costs: `Work` says its MACs, a `LatencyLaw` its milliseconds on an engine.

    losses: of each kind of cut in each block alone, by what it leaves. They are added up, as if cuts didn't know of
    each other. Of levels that a deeper one beats by price, none is taken.
    prune_ratio: share to remove of the `total` that the model costs.

    Raises:
        RecipeError: so much can't be removed.
    """
    shapes = [shape_of(block) for block in vit.blocks]
    start = sum(work(shape) for work, shape in zip(each, shapes, strict=True))

    def removed() -> float:
        return start - sum(work(shape) for work, shape in zip(each, shapes, strict=True))

    step: Step | None = None
    while removed() < prune_ratio * total:
        steps = [found for (i, kind), its in losses.items() if (found := _next(each[i], shapes[i], i, kind, its))]
        if not steps:
            of = "the MACs" if isinstance(each[0], Work) else "the time"
            raise RecipeError(
                f"{technique}: prune_ratio {prune_ratio:g} would empty layers such as those of {vit.blocks[0].name}; "
                f"at most {removed() / total:.0%} of {of} can go from {', '.join(_kinds(losses))} with sizes of this "
                "`multiple`"
            )
        step = min(steps)
        shapes[step.block] = replace(shapes[step.block], **{SIZES[step.kind]: step.left})
    if step is None:
        return shapes
    for left in sorted(losses[step.block, step.kind]):  # of the last cut, no more than is needed
        if left > step.left:
            enough = shapes[step.block]
            shapes[step.block] = replace(enough, **{SIZES[step.kind]: left})
            if removed() < prune_ratio * total:
                shapes[step.block] = enough
                break
    return shapes


def _kinds(losses: Mapping[tuple[int, Kind], Levels]) -> list[str]:
    found = {kind for _, kind in losses}
    return [kind for kind in KINDS if kind in found]


def _next(work: Cost, shape: BlockShape, block: int, kind: Kind, levels: Levels) -> Step | None:
    """The best of the deeper levels of one kind of cut."""
    name = SIZES[kind]
    now = getattr(shape, name)
    before, cost = levels.get(now, 0.0), work(shape)
    steps = [
        Step((loss - before) / saved, block, kind, left)
        for left, loss in levels.items()
        if left < now and (saved := cost - work(replace(shape, **{name: left}))) > 0
    ]
    return min(steps, default=None)
