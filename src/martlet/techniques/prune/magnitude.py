"""magnitude: the units of the smallest weights are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.functional.structure.saliency import each, head_sums, unit_sums
from martlet.vit.pruning import Kind, ScoredPruning, Scores
from martlet.vit.structure import read_attention, read_mlp
from martlet.vit.view import VitView


@dataclass(frozen=True, kw_only=True)
class Magnitude(ScoredPruning):
    """Cut the units whose weights are smallest, and leave a smaller dense model.

    A unit's score is the sum of squares of all weights that go with it, over the mean of its kind in its block; those
    of the least score for each MAC saved go first. The baseline that every other score has to beat: small weights can
    read large activations. `ziplm` loses much less.

    Args:
        prune_ratio: share of the model's MACs to remove, attention's products counted; 0 removes nothing.

    Shape: unchanged outside; heads, their dimensions and hidden units inside.
    Needs: calibration images for the repair; without it none are looked at.
    Cost: at compress time, six forward passes of the images for the repair; at run time, less than before.
    Paper: Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015, arXiv 1506.02626;
        for filters as wholes, Li et al., 2017, arXiv 1608.08710; as Torch-Pruning has them.
    Differs: structure instead of single weights, in vision transformers instead of convolutions; squares instead of
        absolute values, as Torch-Pruning has them; nothing is retrained, but what stays is refitted in closed form.
    Raises: RecipeError for a ratio that would empty layers, or a group that the model can't cut; SourceError for a
        model that isn't a vision transformer.
    """

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "cut the heads' dimensions and hidden units of the smallest weights"
    paper: ClassVar[str] = "Han et al., Learning both Weights and Connections, 2015, arXiv 1506.02626"

    def scores(self, model: Model, vit: VitView, context: Context) -> Scores:
        found = dict[tuple[int, Kind], Tensor]()
        for i, kind in self.cuttable(vit):
            block = vit.blocks[i]
            if kind == "hidden":
                score = unit_sums(each(torch.square, read_mlp(block.mlp)))
            else:
                score = head_sums(each(torch.square, read_attention(block.attention)))[kind]
            found[i, kind] = score / score.mean()
        return found
