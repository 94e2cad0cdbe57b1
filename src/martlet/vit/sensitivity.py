"""How much a model loses when one kind of cut is made in one block alone, with its own repair: measured on logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from martlet.core.technique import Batches, Progress, silent
from martlet.functional.structure.heads import HeadWeights
from martlet.functional.structure.repair import Gram, fit, removal_order, score_bases, units_kept, value_bases
from martlet.nn.attention import ShapedAttention
from martlet.vit.budget import Kind, Levels
from martlet.vit.repair import RIDGE, HeadStatistics, head_statistics, replace_all_
from martlet.vit.streams import First, Streams
from martlet.vit.structure import read_attention, read_mlp, write_attention_, write_mlp_
from martlet.vit.view import view

Key = tuple[int, Kind]
"""A block, and what is cut of it."""


def measured_losses(
    module: nn.Module,
    levels: Mapping[Key, Sequence[int]],
    images: Batches,
    measured_on: int,
    *,
    progress: Progress = silent,
) -> dict[Key, Levels]:
    """Mean KL from the logits of the whole model, in nats, by block, kind of cut, and what it leaves.

    Cuts are the best of their size that `functional/structure/repair.py` knows: bases of q, k and v, and hidden units
    that the others replace, fc2 being fitted again.

    levels: sizes to be left. measured_on: how many leading images losses are measured on, in whole batches; all images
    say what to cut.
    """
    whole = copy.deepcopy(module).eval()
    replace_all_(whole, 0)
    batches = sum(1 for _ in First(images, measured_on))
    streams, found = Streams(whole, images), dict[Key, Levels]()
    expected = [logits.log_softmax(-1) for logits in streams.logits(batches)]

    def loss() -> float:
        kl = [
            functional.kl_div(logits.log_softmax(-1), before, log_target=True, reduction="none").sum(-1)
            for logits, before in zip(streams.logits(batches), expected, strict=True)
        ]
        return max(float(torch.cat(kl).mean()), 0.0)

    depth = len(view(whole).blocks)
    for number in range(depth):
        progress("measuring what cuts lose", number, depth)
        for kind, measure in MEASURES.items():
            if sizes := levels.get((number, kind)):
                found[number, kind] = measure(streams, sizes, loss)
        for _ in streams.run({}, keep=True):
            pass
    return found


def _of_scores(streams: Streams, sizes: Sequence[int], loss: Callable[[], float]) -> Levels:
    weights, found = _attention(streams)
    bases = score_bases(found.queries, found.keys)
    return _try(
        streams,
        weights,
        {left: weights.scores_by(bases.first[..., :left], bases.second[..., :left]) for left in sizes},
        loss,
    )


def _of_values(streams: Streams, sizes: Sequence[int], loss: Callable[[], float]) -> Levels:
    weights, found = _attention(streams)
    bases = {left: value_bases(found.outputs, weights.proj, left) for left in sizes}
    return _try(
        streams, weights, {left: weights.values_by(best.first, best.second) for left, best in bases.items()}, loss
    )


def _attention(streams: Streams) -> tuple[HeadWeights, HeadStatistics]:
    attention = view(streams.module).blocks[streams.done].attention
    return read_attention(attention), head_statistics(streams, cast(ShapedAttention, attention.module))


def _try(streams: Streams, whole: HeadWeights, cuts: Mapping[int, HeadWeights], loss: Callable[[], float]) -> Levels:
    """The loss of each cut of the next block's attention, which is whole again afterwards."""

    def put(weights: HeadWeights) -> None:
        vit = view(streams.module)
        write_attention_(vit, vit.blocks[streams.done], weights)

    losses = {}
    for left, weights in cuts.items():
        put(weights)
        losses[left] = loss()
    put(whole)
    return losses


def _of_units(streams: Streams, sizes: Sequence[int], loss: Callable[[], float]) -> Levels:
    mlp = view(streams.module).blocks[streams.done].mlp
    weights = read_mlp(mlp)
    gram = Gram(weights.num_units, weights.fc2.shape[0])
    for seen in streams.run({"z": (mlp.fc2.module, "in"), "y": (mlp.fc2.module, "out")}):
        gram.add_(seen["z"].flatten(0, -2), seen["y"].flatten(0, -2))
    order, losses = removal_order(gram, RIDGE), {}
    for left in sizes:
        kept = units_kept(order, left)
        cut = weights.units(kept)
        refit = fit(gram, kept, cut.fc2, RIDGE, bias=cut.fc2_bias is not None)
        write_mlp_(view(streams.module).blocks[streams.done].mlp, cut.onto(refit.weight, refit.bias))
        losses[left] = loss()
    write_mlp_(view(streams.module).blocks[streams.done].mlp, weights)
    return losses


MEASURES: Mapping[Kind, Callable[[Streams, Sequence[int], Callable[[], float]], Levels]] = {
    "qk": _of_scores,
    "v": _of_values,
    "hidden": _of_units,
}
