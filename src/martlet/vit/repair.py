"""Cuts a model block by block, and has what stays take over what was cut, in closed form and without labels.

Each block gets the tokens that the cut model gives it; what it should add is what makes them the tokens of the model
as it was. So a block also repairs what those before it have lost.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from martlet.core.technique import Batches, Progress, silent
from martlet.functional.structure.heads import HeadWeights, UnitWeights, selection
from martlet.functional.structure.repair import (
    Fit,
    Gram,
    fit,
    removal_order,
    score_bases,
    score_fit,
    units_kept,
    value_bases,
)
from martlet.nn.attention import ShapedAttention
from martlet.vit.gradients import token_weights
from martlet.vit.streams import First, Streams, Tap
from martlet.vit.structure import (
    BlockShape,
    put_attention_,
    read_attention,
    read_mlp,
    remove_block_,
    shape_of,
    write_attention_,
    write_mlp_,
)
from martlet.vit.view import BlockView, Part, VitView, view

RIDGE = 1e-4
"""Relative to the mean square of an input: how strongly weights are held to what they were."""
GRADIENTS = 96
"""How many images say how much an error of a token counts."""
SMALL = 1e-3
"""Of the greatest of some factors: what is no more than that isn't divided by."""


@dataclass(frozen=True, eq=False)
class Cut:
    """What is to be left of a block: its sizes, and the numbers of what stays.

    heads: (H',); qk: (H', D'); v: (H', E'); hidden: (U',). None where the images are to say what stays: of q, k and v
    then the best bases, which are no selection, and of hidden units those that the others can't replace.
    """

    shape: BlockShape
    heads: Tensor | None = None
    qk: Tensor | None = None
    v: Tensor | None = None
    hidden: Tensor | None = None


def cut_(module: nn.Module, cuts: Mapping[int, Cut]) -> None:
    """Cuts and repairs nothing. All numbers must be there."""
    for number, cut in cuts.items():
        vit = view(module)
        block = vit.blocks[number]
        if _cuts_attention(cut, block):
            weights = _heads(cut, read_attention(block.attention))
            put_attention_(vit, block, _selected(cut, weights))
        if cut.shape.hidden != shape_of(block).hidden:
            assert cut.hidden is not None
            write_mlp_(block.mlp, read_mlp(block.mlp).units(cut.hidden))


def cut_and_repair_(
    module: nn.Module,
    cuts: Mapping[int, Cut],
    images: Batches,
    *,
    removed: Collection[int] = (),
    ridge: float = RIDGE,
    progress: Progress = silent,
) -> None:
    """Cuts, and repairs from the first cut block to the last of the model.

    removed: blocks to take out; none may be the first. The hidden units of a removed block are offered to the block
    before it, which keeps as many as it had, of both, and learns to do the work of both.
    """
    whole = view(module).blocks
    numbers = [i for i in range(len(whole)) if i not in removed]  # of the blocks that stay
    skipped = [after - i - 1 for i, after in zip(numbers, [*numbers[1:], len(whole)], strict=True)]
    grafts = {i: _graft(whole[i], whole[i + 1]) for i, count in zip(numbers, skipped, strict=True) if count}
    first = min([*cuts, *grafts])
    of_tokens = token_weights(module, First(images, GRADIENTS), view(module).tokens.num_prefix)
    old, new = copy.deepcopy(module).eval(), copy.deepcopy(module).eval()
    for twin in (old, new):
        replace_all_(twin, first)
    for twin in (new, module):
        for i in sorted(removed, reverse=True):
            remove_block_(view(twin), i)
    before, after = Streams(old, images), Streams(new, images)
    for _ in range(first):
        for _ in before.run({}, keep=True):
            pass
    after.after, after.done = list(before.after), first
    for number in range(first, len(numbers)):
        progress("repairing blocks", number, len(numbers))
        block = view(new).blocks[number]
        cut = cuts.get(numbers[number]) or Cut(shape_of(block))
        weights = of_tokens[numbers[number] + skipped[number]]
        if _replaceable(view(new), block):
            _cut_attention_(before, after, cut, weights, ridge)
        _cut_mlp_(before, after, cut, weights, ridge, grafts.get(numbers[number]), skipped[number])
        for _ in after.run({}, keep=True):
            pass
        vit, done = view(module), view(new).blocks[number]
        block = vit.blocks[number]
        if _replaceable(vit, block):
            put_attention_(vit, block, read_attention(done.attention))
        write_mlp_(vit.blocks[number].mlp, read_mlp(done.mlp))


def _graft(block: BlockView, gone: BlockView) -> UnitWeights | None:
    """The hidden units of a block that goes, as they read the norm of the block before it; None where a norm over the
    units, or a norm behind the MLP, ties them to the others, or there are no biases to take over a norm's.

    Both norms make the same of a token but for factor and shift, which the weights take over.
    """
    if gone.post_norm or gone.mlp.norm or block.mlp.norm:
        return None
    units = read_mlp(gone.mlp)
    if units.fc1_bias is None or (units.gate is not None and units.gate_bias is None):
        return None
    factors, shifts = zip(*(_affine(each.norm2.module) for each in (block, gone)), strict=True)
    safe = torch.where(factors[0].abs() < SMALL * factors[0].abs().max(), torch.inf, factors[0])
    return units.reading(factors[1] / safe, shifts[1] - factors[1] / safe * shifts[0])


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = norm.get_parameter("weight").detach().double(), getattr(norm, "bias", None)
    return weight, torch.zeros_like(weight) if bias is None else bias.detach().double()


def replace_all_(module: nn.Module, first: int) -> None:
    """Puts the layer that cuts need in the place of every attention from a block on that it can replace."""
    vit = view(module)
    for block in vit.blocks[first:]:
        if _replaceable(vit, block):
            write_attention_(vit, block, read_attention(block.attention))


def _replaceable(vit: VitView, block: BlockView) -> bool:
    return vit.library != "torchvision" or block.attention.window is None


def _cuts_attention(cut: Cut, block: BlockView) -> bool:
    now = shape_of(block)
    return (cut.shape.num_heads, cut.shape.qk_dim, cut.shape.v_dim) != (now.num_heads, now.qk_dim, now.v_dim)


def _heads(cut: Cut, weights: HeadWeights) -> HeadWeights:
    return weights if cut.heads is None else weights.heads(cut.heads)


def _selected(cut: Cut, weights: HeadWeights) -> HeadWeights:
    if cut.qk is not None:
        pick = selection(cut.qk, weights.qk_dim)
        weights = weights.scores_by(pick, pick)
    if cut.v is not None:
        pick = selection(cut.v, weights.v_dim)
        weights = weights.values_by(pick, pick.mT)
    return weights


def _weights(of_tokens: Tensor | None, x: Tensor) -> Tensor | None:
    """How much the error of each token counts, (S,) for x (B, N, C) with S = B N; None if all count the same."""
    return None if of_tokens is None or x.ndim != 3 else of_tokens.to(x).expand(x.shape[:2]).flatten()


def _cut_attention_(before: Streams, after: Streams, cut: Cut, of_tokens: Tensor | None, ridge: float) -> None:
    vit = view(after.module)
    block = vit.blocks[after.done]
    if _cuts_attention(cut, block):
        weights = _heads(cut, read_attention(block.attention))
        if cut.heads is not None:
            write_attention_(vit, block, weights)
        layer = view(after.module).blocks[after.done].attention.module
        assert isinstance(layer, ShapedAttention)
        weights = _shaped(head_statistics(after, layer), cut, weights)
        write_attention_(vit, view(after.module).blocks[after.done], weights)
    old, new = (view(streams.module).blocks[streams.done] for streams in (before, after))
    layers = [layer for each in (old, new) if isinstance(layer := each.attention.module, ShapedAttention)]
    corrects = not new.post_norm and new.attention.window is None
    scale = _scale(new.layer_scale1)
    gram = Gram(layers[1].proj.in_features, layers[1].proj.out_features)
    runs = zip(
        before.run({"x": (old.module, "in"), "y": (layers[0].proj, "out")}),
        after.run({"x": (new.module, "in"), "z": (layers[1].proj, "in")}),
        strict=True,
    )
    for was, now in runs:
        y = was["y"]
        if corrects:
            y = y + (was["x"] - now["x"]) * scale
        gram.add_(now["z"].flatten(0, -2), y.flatten(0, -2), _weights(of_tokens, now["z"]) if corrects else None)
    weight = layers[1].proj.weight.detach()
    found = fit(gram, torch.arange(weight.shape[1]), weight, ridge)
    _set_(layers[1].proj, found)


class HeadStatistics(NamedTuple):
    """Of the heads of an attention on all images.

    queries, keys: (H, D, D), sums of q qᵀ and of k kᵀ, each k without the mean of its image. outputs: (H, E, E), the
    covariance of what heads give.
    """

    queries: Tensor
    keys: Tensor
    outputs: Tensor


def head_statistics(streams: Streams, layer: ShapedAttention) -> HeadStatistics:
    """Of the block that is next, whose attention `layer` is."""
    heads, qk, v = layer.num_heads, layer.qk_dim, layer.v_dim
    queries, keys = (torch.zeros(heads, qk, qk, dtype=torch.float64) for _ in range(2))
    outputs, mean = torch.zeros(heads, v, v, dtype=torch.float64), torch.zeros(heads, v, dtype=torch.float64)
    count = 0
    for seen in streams.run({"qkv": (layer.qkv, "out"), "z": (layer.proj, "in")}):
        q, k, _ = (seen["qkv"][..., rows].unflatten(-1, (heads, -1)) for rows in layer.rows)  # (B, N, H, D)
        k = k - k.mean(1, keepdim=True)
        queries += torch.einsum("bnhd,bnhe->hde", q, q)
        keys += torch.einsum("bnhd,bnhe->hde", k, k)
        z = seen["z"].unflatten(-1, (heads, -1)).flatten(0, 1)  # (S, H, E)
        outputs += torch.einsum("shd,she->hde", z, z)
        mean += z.sum(0)
        count += len(z)
    mean /= count
    return HeadStatistics(queries, keys, outputs / count - mean[:, :, None] * mean[:, None])


def _shaped(found: HeadStatistics, cut: Cut, weights: HeadWeights) -> HeadWeights:
    """q, k and v of the sizes of the cut: of the numbers that it names, or else of the best bases."""
    size = cut.shape.qk_dim
    if cut.qk is not None:
        weights = weights.scores_by(score_fit(found.keys, cut.qk), selection(cut.qk, weights.qk_dim))
    elif size < weights.qk_dim:
        bases = score_bases(found.queries, found.keys)
        weights = weights.scores_by(bases.first[..., :size], bases.second[..., :size])
    if cut.v is not None:
        pick = selection(cut.v, weights.v_dim)
        weights = weights.values_by(pick, pick.mT)
    elif cut.shape.v_dim < weights.v_dim:
        bases = value_bases(found.outputs, weights.proj, cut.shape.v_dim)
        weights = weights.values_by(bases.first, bases.second)
    return weights


def _cut_mlp_(
    before: Streams,
    after: Streams,
    cut: Cut,
    of_tokens: Tensor | None,
    ridge: float,
    graft: UnitWeights | None,
    skipped: int,
) -> None:
    """graft: units that may take the place of the block's own. skipped: blocks that follow it in the whole model only,
    whose work it has to do too.
    """
    old, new = (view(streams.module).blocks[streams.done] for streams in (before, after))
    weights = read_mlp(new.mlp)
    if graft is not None:
        weights = weights.beside(graft)
        write_mlp_(new.mlp, weights)
        new = view(after.module).blocks[after.done]
    gram = Gram(weights.num_units, weights.fc2.shape[0])
    taps: dict[str, Tap] = {"z": (new.mlp.fc2.module, "in")}
    if not new.post_norm:
        taps["x"] = (new.norm2.module, "in")
    outputs = [seen["y"] for seen in before.run({"y": (old.mlp.fc2.module, "out")}, keep=True)] if new.post_norm else []
    for _ in range(skipped if new.post_norm else skipped + 1):
        for _ in before.run({}, keep=True):
            pass
    for i, seen in enumerate(after.run(taps)):
        if new.post_norm:  # the norm comes after, and reads what fc2 gives
            y = outputs[i]
        else:
            out = before.after[i][0] if isinstance(before.after[i], tuple) else before.after[i]
            y = (out - seen["x"].view_as(out)) * _scale(new.layer_scale2)
        gram.add_(seen["z"].flatten(0, -2), y.flatten(0, -2), _weights(of_tokens, seen["z"]))
    kept = torch.arange(weights.num_units)
    if cut.hidden is not None:
        kept = cut.hidden
    elif cut.shape.hidden < weights.num_units:
        kept = units_kept(removal_order(gram, ridge), cut.shape.hidden)
    weights = weights.units(kept)
    found = fit(gram, kept, weights.fc2, ridge, bias=weights.fc2_bias is not None)
    write_mlp_(new.mlp, weights.onto(found.weight, found.bias))


def _scale(part: Part | None) -> Tensor | float:
    """By what an error of the residual stream is multiplied to be one of what a layer scale gets."""
    if part is None:
        return 1.0
    [gamma] = part.module.parameters()
    gamma = gamma.detach()
    small = gamma.abs() < SMALL * gamma.abs().max()  # where hardly anything goes through, nothing can be repaired
    return torch.where(small, 0, 1 / gamma)


@torch.no_grad()
def _set_(linear: nn.Linear, found: Fit) -> None:
    linear.weight.copy_(found.weight)
    if found.bias is not None:
        linear.bias.copy_(found.bias)
