"""Structure of a view: what can be cut of it, and the surgery that cuts.

What goes together: a head is rows of q, k and v and columns of proj; a dimension of q and k is a row of each, in every
head; a dimension of v is a row of v and a column of proj; a hidden unit is a row of fc1 (and of the gate) and a column
of fc2; the width is a feature of every token, so of everything that reads or writes the residual stream. The tensors of
an attention or MLP are read as `HeadWeights` or `UnitWeights`, changed there, and put back.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from martlet.core.errors import RecipeError, SourceError
from martlet.functional.structure.heads import HeadWeights, UnitWeights
from martlet.nn.attention import ShapedAttention
from martlet.vit.view import AttentionView, BlockView, LinearView, MlpView, Part, VitView, join, view

WIDTHS = ("embed_dim", "num_features", "head_hidden_size", "hidden_dim", "out_channels")
"""What libraries call the width of the residual stream, where they keep it beside the tensors."""


@dataclass(frozen=True)
class BlockShape:
    """How large a block is: heads, dimensions of each for q and k and for v, hidden units."""

    num_heads: int
    qk_dim: int
    v_dim: int
    hidden: int


def shape_of(block: BlockView) -> BlockShape:
    attention = block.attention
    return BlockShape(attention.num_heads, attention.head_dim, attention.value_dim, size(block.mlp.fc1))


def size(map_: LinearView) -> int:
    return map_.rows.stop - map_.rows.start


def read_attention(attention: AttentionView, gradients: bool = False) -> HeadWeights:
    """Copies, in float64; of gradients if they are asked for, without positions."""
    heads = attention.num_heads

    def by_head(map_: LinearView) -> tuple[Tensor, Tensor]:
        weight, bias = _read(map_, gradients)
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return weight.unflatten(0, (heads, -1)), bias.unflatten(0, (heads, -1))

    proj, bias = _read(attention.proj, gradients)
    return HeadWeights(
        *by_head(attention.query),
        *by_head(attention.key),
        *by_head(attention.value),
        proj.unflatten(1, (heads, -1)),
        proj.new_zeros(proj.shape[0]) if bias is None else bias,
        None if attention.window is None or gradients else _double(attention.window.position_bias()),
    )


def read_mlp(mlp: MlpView, gradients: bool = False) -> UnitWeights:
    """Copies, in float64; of gradients if they are asked for, without the norm's."""
    norm = None if mlp.norm is None or gradients else cast(nn.LayerNorm, mlp.norm.module)
    return UnitWeights(
        *_read(mlp.fc1, gradients),
        *_read(mlp.fc2, gradients),
        *(_read(mlp.gate, gradients) if mlp.gate else (None, None)),
        None if norm is None else _maybe(norm.weight),
        None if norm is None else _maybe(norm.bias),
    )


def _read(map_: LinearView, gradients: bool) -> tuple[Tensor, Tensor | None]:
    weight, bias = map_.weight, map_.bias
    if gradients:
        weight, bias = (
            None if (p := getattr(map_.module, name)) is None else p.grad[map_.rows]
            for name in (map_.weight_name, map_.bias_name)
        )
    return _double(cast(Tensor, weight)), _maybe(bias)


def _double(x: Tensor) -> Tensor:
    return x.detach().double().clone()


def _maybe(x: Tensor | None) -> Tensor | None:
    return None if x is None else _double(x)


def check_attention(vit: VitView, block: BlockView, technique: str, what: str) -> None:
    """Raises:
    RecipeError: no layer can take the place of this attention.
    """
    attention = block.attention
    if what == "qk" and (attention.query_norm or attention.key_norm):
        raise RecipeError(
            f"{technique} can't cut dimensions of q and k at {attention.name}, which are normalized together"
        )
    if what in ("heads", "v") and attention.norm:
        raise RecipeError(f"{technique} can't cut {what} at {attention.name}, whose output is normalized as a whole")
    if vit.library == "torchvision" and attention.window is not None:
        raise RecipeError(
            f"{technique} can't cut {what} at {attention.name}: torchvision's windows are inside its attention; it "
            "can cut hidden units there, and heads of the Swin of timm and Hugging Face"
        )


def write_attention_(
    vit: VitView,
    block: BlockView,
    weights: HeadWeights,
    slots: tuple[int, int] | None = None,
    mixed: bool = False,
) -> ShapedAttention:
    """Puts a layer of these sizes and values in the place of an attention. The view of it is stale afterwards.

    slots, mixed: as of `ShapedAttention`.
    """
    old = block.attention
    adapter = importlib.import_module(f"martlet.vit.hosts.{vit.library}")
    like = old.proj.weight
    window = None if old.window is None else old.window.size
    layer: ShapedAttention = adapter.CutAttention(
        weights.proj.shape[0],
        weights.num_heads,
        weights.qk_dim,
        weights.v_dim,
        old.scale,
        query_norm=_module(old.query_norm),
        key_norm=_module(old.key_norm),
        norm=_module(old.norm),
        window=window,
        slots=slots,
        mixed=mixed,
    ).to(like)
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.cat([each.flatten(0, 1) for each in (weights.q, weights.k, weights.v)]))
        layer.qkv.bias.copy_(torch.cat([each.flatten() for each in (weights.q_bias, weights.k_bias, weights.v_bias)]))
        layer.proj.weight.copy_(weights.proj.flatten(1))
        layer.proj.bias.copy_(weights.proj_bias)
        if layer.position is not None:
            layer.position.set_(cast(Tensor, weights.position))
    put_(vit.root, old.name, layer.train(old.module.training))
    return layer


@torch.no_grad()
def put_attention_(vit: VitView, block: BlockView, weights: HeadWeights) -> None:
    """Writes into the library's own attention where the sizes are its own, and replaces it where they aren't."""
    now, old = shape_of(block), block.attention
    same = (weights.num_heads, weights.qk_dim, weights.v_dim) == (now.num_heads, now.qk_dim, now.v_dim)
    if not same or any(map_.bias is None for map_ in (old.query, old.key, old.value, old.proj)):
        write_attention_(vit, block, weights)
        return
    for map_, weight, bias in (
        (old.query, weights.q, weights.q_bias),
        (old.key, weights.k, weights.k_bias),
        (old.value, weights.v, weights.v_bias),
    ):
        map_.weight.copy_(weight.flatten(0, 1))
        cast(Tensor, map_.bias).copy_(bias.flatten())
    old.proj.weight.copy_(weights.proj.flatten(1))
    cast(Tensor, old.proj.bias).copy_(weights.proj_bias)


def _module(part: Part | None) -> nn.Module | None:
    return None if part is None else part.module


def put_(root: Part, name: str, module: nn.Module) -> None:
    """Replaces a module by its qualified name, which begins with that of the root."""
    inside = name.removeprefix(root.name).removeprefix(".")
    owner, _, leaf = inside.rpartition(".")
    setattr(root.module.get_submodule(owner), leaf, module)


def write_mlp_(mlp: MlpView, weights: UnitWeights) -> None:
    """Gives the Linears of an MLP these values, and with them their sizes. The view of it is stale afterwards."""
    fc1 = [(mlp.fc1, weights.fc1, weights.fc1_bias)]
    if mlp.gate is not None:
        fc1.append((mlp.gate, cast(Tensor, weights.gate), weights.gate_bias))
    for module in {id(map_.module): map_.module for map_, _, _ in fc1}.values():
        mine = sorted((each for each in fc1 if each[0].module is module), key=lambda each: each[0].rows.start)
        biases = [bias for _, _, bias in mine if bias is not None]
        _set_(module, torch.cat([weight for _, weight, _ in mine]), torch.cat(biases) if biases else None)
    _set_(mlp.fc2.module, weights.fc2, weights.fc2_bias)
    if mlp.norm is not None:
        norm = cast(nn.LayerNorm, mlp.norm.module)
        norm.normalized_shape = (weights.num_units,)
        for name, values in (("weight", weights.norm), ("bias", weights.norm_bias)):
            if values is not None:
                setattr(norm, name, nn.Parameter(values.to(getattr(norm, name))))


def _set_(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    linear = cast(nn.Linear, module)
    like = linear.weight
    linear.weight = nn.Parameter(weight.to(like))
    linear.bias = None if bias is None else nn.Parameter(bias.to(like))  # type: ignore[assignment]
    linear.out_features, linear.in_features = weight.shape


def remove_block_(vit: VitView, number: int) -> None:
    """Takes a block out; those after it move up, and so do their names.

    Raises:
        RecipeError: it is the only one of its stage.
    """
    block = vit.blocks[number]
    if sum(other.stage == block.stage for other in vit.blocks) == 1:
        raise RecipeError(f"{block.name} is the only block of its stage; at least one has to stay")
    owner = vit.root.module.get_submodule(block.name.removeprefix(vit.root.name).removeprefix(".").rpartition(".")[0])
    modules = list(owner.children())
    del cast(nn.ModuleList, owner)[next(i for i, module in enumerate(modules) if module is block.module)]


def record_of(before: VitView, kept: list[int], after: VitView) -> dict[str, Any]:
    """The sizes that a cut has left, as JSON.

    kept: which blocks of `before` those of `after` are. A block is written down if it was cut, and an attention if a
    layer of Martlet's has taken its place.
    """
    blocks = []
    for number, block in zip(kept, after.blocks, strict=True):
        old, new = before.blocks[number], shape_of(block)
        replaced = isinstance(block.attention.module, ShapedAttention)
        if new != shape_of(old) or replaced:
            blocks.append([number, new.num_heads, new.qk_dim, new.v_dim, new.hidden, replaced])
    removed = sorted(set(range(len(before.blocks))) - set(kept))
    width = None if after.embed_dim == before.embed_dim else after.embed_dim
    return {"blocks": blocks, "removed": removed, "width": width}


def restore_structure_(module: nn.Module, record: Mapping[str, Any]) -> None:
    """Gives a fresh model the sizes of a record; the values mean nothing until the artifact's tensors are loaded."""
    vit = view(module)
    for number, heads, qk, v, hidden, replaced in record["blocks"]:
        block = vit.blocks[number]
        if replaced:
            weights = read_attention(block.attention)
            weights = weights.heads(torch.arange(heads))
            write_attention_(vit, block, _first(weights, qk, v))
        if hidden != shape_of(block).hidden:
            write_mlp_(block.mlp, read_mlp(block.mlp).units(torch.arange(hidden)))
    for number in sorted(record["removed"], reverse=True):
        remove_block_(vit, number)
        vit = view(module)
    if record["width"] is not None:
        cut_width_(view(module), torch.arange(record["width"]))


def _first(weights: HeadWeights, qk: int, v: int) -> HeadWeights:
    """The first dimensions of each head."""
    eye = torch.eye(weights.qk_dim, dtype=weights.q.dtype).expand(weights.num_heads, -1, -1)
    weights = weights.scores_by(eye[..., :qk], eye[..., :qk])
    eye = torch.eye(weights.v_dim, dtype=weights.q.dtype).expand(weights.num_heads, -1, -1)
    return weights.values_by(eye[..., :v], eye[:, :v])


def cut_width_(vit: VitView, kept: Tensor) -> None:
    """Leaves of every token the features of these numbers: of all that writes or reads the residual stream.

    Raises:
        RecipeError: stages of several widths. SourceError: a module that holds features in a way that isn't known.
    """
    if vit.family == "swin":
        raise RecipeError(
            f"the width at {vit.blocks[0].name} can't be cut: the patch merging after its stage mixes it with the "
            "next stage's; cut hidden units, heads, qk and v"
        )
    outside = _features(vit)
    for block in vit.blocks:
        write_attention_(vit, block, read_attention(block.attention).features(kept))
        write_mlp_(block.mlp, read_mlp(block.mlp).features(kept))
    for module, leaf, dim in outside:
        values = getattr(module, leaf).detach()
        firsts = range(0, values.shape[dim], vit.embed_dim)  # a head may read several tokens, one after the other
        index = torch.cat([kept + first for first in firsts]).to(values.device)
        setattr(module, leaf, nn.Parameter(values.index_select(dim, index)))
        if isinstance(module, nn.Linear):
            module.in_features = len(index)
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (len(kept),)
    for module in (vit.root.module, vit.patch_embed.module, *(module for module, _, _ in outside)):
        for leaf in WIDTHS:
            if getattr(module, leaf, None) == vit.embed_dim:
                setattr(module, leaf, len(kept))


def _features(vit: VitView) -> list[tuple[nn.Module, str, int]]:
    """Every parameter outside attention and MLP that holds features of tokens: its module, its name, and where.

    Raises:
        SourceError: one of which that isn't known.
    """
    inside = {id(m) for block in vit.blocks for part in (block.attention, block.mlp) for m in part.module.modules()}
    heads = {id(head.module) for head in vit.heads}
    found = list[tuple[nn.Module, str, int]]()
    for name, module in vit.root.module.named_modules():
        if id(module) in inside:
            continue
        for leaf, values in module.named_parameters(recurse=False):
            if id(module) in heads:
                if leaf == "weight":
                    found.append((module, leaf, 1))
                continue
            dim = 0 if isinstance(module, nn.Conv2d) else values.ndim - 1
            if isinstance(module, nn.Linear) or values.shape[dim] != vit.embed_dim:
                raise SourceError(
                    f"the width of {vit.root.name or 'this model'} can't be cut: nothing says which features of tokens "
                    f"{join(vit.root.name, name, leaf)} holds"
                )
            found.append((module, leaf, dim))
    return found
