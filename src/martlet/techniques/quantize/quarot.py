"""quarot: residual streams and values turned by Hadamard matrices, so that no channel stands out when it is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

from martlet.core.facts import Fact
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique
from martlet.graph.rewrite.rotate import spread_


@dataclass(frozen=True, kw_only=True)
class QuaRot(Technique):
    """Turn what a transformer's blocks read and write, and v of each head, by random Hadamard matrices.

    An exact change, after which the channels of a LayerNorm's output have alike ranges: whatever rounds them next loses
    less. The weights take all of it up, so that nothing is left to compute. Of no use to models without LayerNorms
    over channels: the record counts what was turned, and names why a LayerNorm wasn't.

    Shape: none changes.
    Needs: nothing.
    Cost: some products with each weight; none at run time.
    Paper: Ashkboos et al., QuaRot, 2024, arXiv 2404.00456, stages 1a to 1c.
    Differs: rotations keep the vector of ones, so that a LayerNorm stays one. Nothing is turned while the model runs,
        so the input of an MLP's second Linear isn't; q and k aren't either, whose grids go by head.
    Raises: NumericsError for a LayerNorm whose scale or shift is NaN.
    """

    name: ClassVar[str] = "quarot"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "residual streams and values turned by Hadamard matrices, exactly, before rounding"
    paper: ClassVar[str] = "Ashkboos et al., QuaRot, 2024, arXiv 2404.00456"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.UNFUSED})

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        assert isinstance(model.module, GraphModule)
        return spread_(model.module, torch.Generator().manual_seed(context.seed))

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        """Parameters alone have changed."""
