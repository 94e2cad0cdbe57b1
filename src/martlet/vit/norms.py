"""Norms of a view that a factor and a shift of each feature can replace, and Linears that take these over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from martlet.core.errors import RecipeError
from martlet.vit.structure import put_
from martlet.vit.view import LinearView, Part, VitView


@dataclass(frozen=True, eq=False)
class NormSite:
    """A norm, and the maps beside it. after: they read what it gives; else it reads what they, one map, give."""

    norm: Part
    maps: tuple[LinearView, ...]
    after: bool

    @property
    def owners(self) -> list[LinearView]:
        """One of the maps for each module."""
        return list({id(map_.module): map_ for map_ in self.maps}.values())


def norm_sites(vit: VitView, technique: str) -> list[NormSite]:
    """All norms of the model, in order.

    Raises:
        RecipeError: one that no Linear stands beside, or that isn't a LayerNorm; or a model of several stages.
    """
    if vit.family == "swin":
        raise RecipeError(
            f"{technique}: norms at {vit.blocks[0].name} are followed by padded windows, and between stages by no part "
            "of the view; it takes models whose attention is global, such as ViT and DeiT"
        )
    found = []
    for block in vit.blocks:
        attention, mlp = block.attention, block.mlp
        reading = (attention.query, attention.key, attention.value), (mlp.fc1, *([mlp.gate] if mlp.gate else []))
        writing = (attention.proj,), (mlp.fc2,)
        for norm, maps in zip((block.norm1, block.norm2), writing if block.post_norm else reading, strict=True):
            found.append(NormSite(norm, maps, not block.post_norm))
    if vit.norm is not None and vit.heads:
        found.append(NormSite(vit.norm, vit.heads, True))
    known = {id(site.norm.module) for site in found}
    for name, module in vit.root.module.named_modules():
        if "norm" in type(module).__name__.lower() and id(module) not in known:
            raise RecipeError(f"{technique}: no Linear beside {name} can take over what {type(module).__name__} does")
    for site in found:
        if not isinstance(site.norm.module, nn.LayerNorm):
            raise RecipeError(f"{technique}: {site.norm.name} is no LayerNorm but {type(site.norm.module).__name__}")
    return found


@torch.no_grad()
def fold_(site: NormSite, factor: Tensor, shift: Tensor) -> None:
    """Gives the Linears what a factor and a shift of each feature (C,), in float64, do beside them."""
    add_biases_([site])
    for owner in site.owners:
        weight, bias = (getattr(owner.module, name) for name in (owner.weight_name, owner.bias_name))
        if site.after:
            bias.copy_(bias.double() + weight.double() @ shift)
            weight.copy_(weight.double() * factor)
        else:
            bias.copy_(bias.double() * factor + shift)
            weight.copy_(weight.double() * factor[:, None])


def add_biases_(sites: Sequence[NormSite]) -> None:
    """Gives a bias of zeros to every Linear without one."""
    for owner in (owner for site in sites for owner in site.owners):
        if getattr(owner.module, owner.bias_name) is None:
            weight = cast(Tensor, getattr(owner.module, owner.weight_name))
            setattr(owner.module, owner.bias_name, nn.Parameter(weight.new_zeros(weight.shape[0])))


def take_out_(vit: VitView, sites: Sequence[NormSite]) -> None:
    """Takes the norms out. The view is stale afterwards."""
    for site in sites:
        put_(vit.root, site.norm.name, nn.Identity())
