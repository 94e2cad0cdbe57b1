"""What techniques share that make weights zero and leave sizes as they are: Linear by Linear, by what each reads."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.nn.attention import ShapedAttention
from martlet.vit.repair import replace_all_
from martlet.vit.streams import Streams, Tap
from martlet.vit.structure import check_attention
from martlet.vit.view import BlockView, LinearView, view


@dataclass(frozen=True, kw_only=True)
class Sparsity(Technique):
    """What makes so many of each so many neighboring weights of every Linear in a block zero. Training leaves them so.

    Args:
        zeros: how many of the neighbors in a row become zero.
        of: how many neighbors there are; `zeros: 2, of: 4` is what sparse tensor cores take.
        run: how many zeros stand together; `zeros: 4, of: 8, run: 2` is what the cores take in 4 bits.
    """

    stage: ClassVar[Stage] = Stage.MODULE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.MODULE, Fact.ALL_TOKENS, Fact.WHOLE_LINEARS})
    needs_images: ClassVar[bool] = True

    leaves_zeros: ClassVar[bool] = True

    zeros: int = 2
    of: int = 4
    run: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.zeros < self.of:
            raise RecipeError(f"{self.name}: zeros is from 0 to less than of, not {self.zeros} of {self.of}")
        if self.run < 1 or self.zeros % self.run or self.of % self.run:
            raise RecipeError(f"{self.name}: run has to divide zeros and of, and {self.run} doesn't")

    @abstractmethod
    def sparse(self, weight: Tensor, xx: Tensor) -> Tensor:
        """W (O, I) with its zeros; xx (I, I) is the sum of x xᵀ. Float64."""

    def check(self, model: Model) -> None:
        vit = view(model.module)
        for block in vit.blocks:
            check_attention(vit, block, self.name, "weights")
            for map_ in (each for its in _maps(block).values() for each in its):
                if map_.weight.shape[1] % self.of:
                    raise RecipeError(
                        f"{self.name}: {map_.name} has {map_.weight.shape[1]} inputs, which groups of {self.of} don't "
                        "fill; choose another `of`"
                    )

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        images, depth = context.calibration(self), len(view(model.module).blocks)
        if self.zeros:
            twin = copy.deepcopy(model.module).eval()
            replace_all_(twin, 0)
            streams = Streams(twin, images)
            for number in range(depth):
                context.progress("making weights zero", number, depth)
                block, mine = view(twin).blocks[number], view(model.module).blocks[number]
                grams = _grams(streams, block)
                for name, maps in _maps(block).items():
                    for ours, its in zip(_maps(mine)[name], maps, strict=True):
                        found = self.sparse(its.weight.detach().double(), grams[name])
                        with torch.no_grad():
                            for each in (ours, its):
                                each.weight.copy_(found)
                for _ in streams.run({}, keep=True):
                    pass
        return {"images": images.num_images}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        """Sizes are what they were; which weights are zero, their values say."""


def _maps(block: BlockView) -> dict[str, list[LinearView]]:
    """The maps of a block by what they read."""
    attention, mlp = block.attention, block.mlp
    return {
        "tokens": [attention.query, attention.key, attention.value],
        "heads": [attention.proj],
        "mlp": [mlp.fc1, mlp.gate] if mlp.gate else [mlp.fc1],
        "units": [mlp.fc2],
    }


def _grams(streams: Streams, block: BlockView) -> dict[str, Tensor]:
    layer = cast(ShapedAttention, block.attention.module)
    taps: dict[str, Tap] = {
        "tokens": (layer.qkv, "in"),
        "heads": (layer.proj, "in"),
        "mlp": (block.mlp.fc1.module, "in"),
        "units": (block.mlp.fc2.module, "in"),
    }
    grams: dict[str, Tensor] = {}
    for seen in streams.run(taps):
        for name, x in seen.items():
            x = x.flatten(0, -2)
            grams[name] = grams.get(name, 0) + (x.mT @ x).double()
    return grams
