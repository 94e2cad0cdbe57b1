"""lpvit: square blocks of weights become zero, by a second-order expansion of the loss and by power."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.functional.structure.blocks import block_sums, choose_blocks, power_weight, spread_blocks
from martlet.vit.budget import total_macs, works
from martlet.vit.view import LinearView, VitView, view

LEAST = 0.2
"""The share of blocks that stays in every layer, as in the official code."""


@dataclass(frozen=True, kw_only=True)
class LPViT(Technique):
    """Make square blocks of weights zero: those whose loss is least for what they save in multiplications and power.

    A block's loss is a second-order expansion with the empirical Fisher matrix in the place of the Hessian, of the mean
    square of the logits. Power goes by blocks that are left times features that they read. Tensors keep their sizes, so
    only engines with kernels for sparse blocks gain by it; OpenVINO and ONNX Runtime have none on CPUs.

    Args:
        prune_ratio: share of the model's MACs that zero blocks stand for; 0 makes none zero.
        block: side of a block, in weights. Rows and columns of every Linear have to be multiples of it.
        power: count power beside MACs, as the paper does. Without hardware that gains by it, it only costs accuracy.

    Shape: unchanged.
    Needs: calibration images, without labels, and memory for gradients of one batch.
    Cost: at compress time, one forward and backward pass of the images; at run time, what it was, without such kernels.
    Paper: Xu et al., LPViT: Low-Power Semi-structured Pruning for Vision Transformers, 2024, arXiv 2407.02068. The
        paper's text wasn't at hand; numbers and formulas are those of the official code.
    Differs: losses of blocks are added up, cross terms between blocks left out, so that one sort replaces the search
        for a slope on smoothed curves. Nothing is fine-tuned.
    Raises: RecipeError for Linears that blocks don't fill, or more MACs than can go; SourceError for a model that isn't
        a vision transformer.
    """

    name: ClassVar[str] = "lpvit"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "make square blocks of weights zero, by second-order loss and power"
    paper: ClassVar[str] = "Xu et al., LPViT: Low-Power Semi-structured Pruning, 2024, arXiv 2407.02068"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULE, Fact.ALL_TOKENS, Fact.WHOLE_LINEARS})
    needs_images: ClassVar[bool] = True
    leaves_zeros: ClassVar[bool] = True

    prune_ratio: float = 0.2
    block: int = 16
    power: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.prune_ratio < 1:
            raise RecipeError(f"{self.name}: prune_ratio is from 0 to less than 1, not {self.prune_ratio}")
        if self.block < 1:
            raise RecipeError(f"{self.name}: block is at least 1, not {self.block}")

    def check(self, model: Model) -> None:
        for map_ in linears(view(model.module)):
            for size in map_.weight.shape:
                if size % self.block:
                    raise RecipeError(
                        f"{self.name}: {map_.name} has {tuple(map_.weight.shape)} weights, which blocks of "
                        f"{self.block} don't fill; choose a block that divides both"
                    )

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        images, vit = context.calibration(self), view(model.module)
        if self.prune_ratio:
            maps = linears(vit)
            losses = self.losses(model, context)
            rows = [n for work in works(model, vit) for n in (*[work.rows] * 4, *[work.mlp_rows] * (work.mlp_maps))]
            macs = [float(self.block**2 * n) for n in rows]
            powers = [map_.weight.shape[1] // 16 * 1.0 for map_ in maps]
            weight = power_weight(losses, powers) if self.power else 0.0
            need = self.prune_ratio * total_macs(model)
            stay = choose_blocks(losses, macs, powers, weight, need, LEAST)
            gone = sum(float((~each).sum()) * m for each, m in zip(stay, macs, strict=True))
            if gone < need:
                raise RecipeError(
                    f"{self.name}: prune_ratio {self.prune_ratio:g} would empty layers such as {maps[0].name}; zero "
                    f"blocks can stand for at most {gone / need * self.prune_ratio:.0%} of the MACs"
                )
            with torch.no_grad():
                for map_, each in zip(maps, stay, strict=True):
                    map_.weight.mul_(spread_blocks(each, self.block).to(map_.weight))
        return {"images": images.num_images}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        """Sizes are what they were; which weights are zero, their values say."""

    def losses(self, model: Model, context: Context) -> list[Tensor]:
        """By Linear and block (P, Q), the mean over batches of sum (g w)² / weights + (sum g w)² / 2."""
        twin = copy.deepcopy(model.module).eval().requires_grad_(True)
        maps, images = linears(view(twin)), context.calibration(self)
        totals = [torch.zeros(tuple(n // self.block for n in map_.weight.shape), dtype=torch.float64) for map_ in maps]
        for done, batch in enumerate(images, 1):
            twin.zero_grad(set_to_none=True)
            with torch.enable_grad():
                twin(batch).square().mean().backward()
            for total, map_ in zip(totals, maps, strict=True):
                gradient = getattr(map_.module, map_.weight_name).grad[map_.rows]
                products = (map_.weight.detach() * gradient).double()
                total += block_sums(products.square(), self.block) / products.numel()
                total += block_sums(products, self.block).square() / 2
            context.progress("gradients", done * len(batch), images.num_images)
        return totals


def linears(vit: VitView) -> list[LinearView]:
    """Of every block: q, k, v, proj, and those of the MLP, as many as `Work.mlp_maps`."""
    found = list[LinearView]()
    for block in vit.blocks:
        attention, mlp = block.attention, block.mlp
        found += [attention.query, attention.key, attention.value, attention.proj, mlp.fc1, mlp.fc2]
        found += [mlp.gate] if mlp.gate else []
    return found
