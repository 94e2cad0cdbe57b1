"""minivit: several blocks share the weights of one, each with norms and mixtures of heads of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import nn

from martlet.core.errors import RecipeError
from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.vit.structure import check_attention, read_attention, shape_of, write_attention_
from martlet.vit.view import BlockView, VitView, view


@dataclass(frozen=True, kw_only=True)
class MiniViT(Technique):
    """Store the weights of one block for several that follow each other: attention's four maps, and those of the MLP.

    What tells the blocks apart is what they keep: norms, scales, and two matrices each that mix heads, before the
    softmax and after it. Weights become those of the first block of each group, and what the others knew is lost, so
    train after it: `minivit | distill`, with `relations` for the paper's attention distillation. The file and the
    memory get smaller, and nothing gets faster. For a model that has to be small to be sent or kept.

    Args:
        share: blocks in a group, the last of a stage having what is left; 1 shares nothing, 0 is all blocks of a stage.
        mixed: give each block its mixtures of heads; False shares weights and nothing else, and costs nothing at run
            time.

    Shape: none changes.
    Needs: nothing, but training after it.
    Cost: at run time, what it was, and two products with H × H weights for each pair of tokens.
    Paper: Zhang et al., MiniViT: Compressing Vision Transformers with Weight Multiplexing, 2022, arXiv 2204.07154, from
        its abstract and official code: norms and mixtures of heads by block; its transformation of the MLP, which the
        code for DeiT hasn't either, is left out.
    Differs: a trained model is converted: mixtures begin as the identity and not as noise, weights as the first
        block's, where the paper trains from the start with a teacher. Relative positions aren't added.
    Raises: RecipeError for blocks of several sizes, or attention of torchvision's Swin; SourceError for a model that
        isn't a vision transformer.
    """

    name: ClassVar[str] = "minivit"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "weights of one block for several, with norms and mixtures of heads of their own"
    paper: ClassVar[str] = "Zhang et al., MiniViT: Weight Multiplexing, 2022, arXiv 2204.07154"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ALL_TOKENS, Fact.WHOLE_LINEARS, Fact.ONE_EXIT})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.WHOLE_LINEARS})

    share: int = 2
    mixed: bool = True

    def __post_init__(self) -> None:
        if self.share < 0:
            raise RecipeError(
                f"minivit: share is how many blocks have the same weights, or 0 for all, not {self.share}"
            )

    def check(self, model: Model) -> None:
        vit = view(model.module)
        for group in self._groups(vit):
            first = vit.blocks[group[0]]
            for block in (vit.blocks[number] for number in group):
                check_attention(vit, block, self.name, "weights")
                if _form(block) != _form(first):
                    raise RecipeError(
                        f"minivit: {block.name} can't have the weights of {first.name}, which has other sizes; cut "
                        "all blocks to the same sizes, or none"
                    )

    def _groups(self, vit: VitView) -> list[list[int]]:
        """The numbers of blocks that are to share, group by group."""
        found = []
        for stage in sorted({block.stage for block in vit.blocks}):
            numbers = [i for i, block in enumerate(vit.blocks) if block.stage == stage]
            share = self.share or len(numbers)
            found += [numbers[i : i + share] for i in range(0, len(numbers), share)]
        return [group for group in found if len(group) > 1]

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        record = {"groups": self._groups(view(model.module)), "mixed": self.mixed}
        self.restore_(model, record)
        return record

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        for group in record["groups"]:
            for number in group:
                vit = view(model.module)
                block = vit.blocks[number]
                write_attention_(vit, block, read_attention(block.attention), mixed=record.get("mixed", True))
            blocks = view(model.module).blocks
            for number in group[1:]:
                for own, first in zip(_linears(blocks[number]), _linears(blocks[group[0]]), strict=True):
                    own.weight, own.bias = first.weight, first.bias


def _linears(block: BlockView) -> list[nn.Linear]:
    """Once attention is Martlet's: qkv, proj, and those of the MLP."""
    maps = [block.attention.query, block.attention.proj, block.mlp.fc1, block.mlp.fc2]
    maps += [block.mlp.gate] if block.mlp.gate and block.mlp.gate.module is not block.mlp.fc1.module else []
    return [cast(nn.Linear, map_.module) for map_ in maps]


def _form(block: BlockView) -> tuple[object, ...]:
    """What has to be equal for two blocks to have the same weights."""
    mlp = block.mlp
    biases = tuple(map_.bias is None for map_ in (mlp.fc1, mlp.fc2))
    return shape_of(block), block.attention.scale, mlp.is_gated, mlp.fc1.weight_name, biases
