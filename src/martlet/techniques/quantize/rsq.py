"""rsq: rotate, scale, quantize: GPTQ on rotated weights, in which tokens that get more attention count more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.errors import RecipeError
from martlet.core.technique import Context
from martlet.functional.quantize.gptq import attention_concentration
from martlet.graph.attention import attentions
from martlet.graph.observe import OneBatch, observe_calls
from martlet.graph.rewrite.rotate import spread_
from martlet.graph.segments import blocks
from martlet.graph.sequential import SequentialWeights
from martlet.graph.sites import Site, sites

TOKENS = ("attention", "equal")


@dataclass(frozen=True, kw_only=True)
class RSQ(SequentialWeights):
    """Quantize the weights of every Linear to a few bits, for the tokens that others attend to more than for the rest.

    Residual streams and v of each head are rotated by Hadamard matrices, which goes into the weights and leaves no
    outlier among them; then each Linear is rounded as GPTQ does. For a small file, as `gptq`, and no faster. Where
    groups of weights have scales of their own, rotations have little left to gain: at 3 bits, in groups of 32, `gptq`
    kept more of ViT-Ti (64 % against 60 % of 100 images, simulated). Linears outside an attention's block, the last one
    among them, see all their rows alike, and so do those whose tokens aren't laid out as in the attention.

    Args:
        tokens: `attention`, a token counts by the attention it gets (attention concentration); `equal`, all alike,
            which is GPTQ on rotated weights.

    Shape: none changes.
    Needs: images, without labels; 64 are enough for most models.
    Cost: two forward passes, with the activations of all images in memory, and for each Linear a Cholesky
        factorization of its input features; at run time, the weights' unpacking.
    Paper: Sung et al., RSQ, 2025, arXiv 2503.01820.
    Differs: attention is that of the float model, where the official code has that of the model rounded so far. What
        gives a token's weight is scaled in each image. Rotations keep the vector of ones, so that LayerNorms stay
        LayerNorms; of QuaRot's those that would have to be computed at run time are left out.
    Raises: RecipeError for a setting out of range, groups that divide no Linear's input features, or without images;
        UsageError if the model has no Linear; NumericsError for inputs that are NaN, or a damping too small.
    """

    name: ClassVar[str] = "rsq"
    summary: ClassVar[str] = "GPTQ on rotated weights, for the tokens that get most attention"
    paper: ClassVar[str] = "Sung et al., RSQ, 2025, arXiv 2503.01820"

    tokens: str = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens not in TOKENS:
            raise RecipeError(f"rsq: tokens is {self.tokens!r}; it can be {', '.join(TOKENS)}")

    def prepare_(self, graph_module: GraphModule, context: Context) -> dict[str, Any]:
        return spread_(graph_module, torch.Generator().manual_seed(context.seed))

    def importance(
        self, graph_module: GraphModule, found: Sequence[Site], images: Tensor, context: Context
    ) -> Mapping[Node, Tensor]:
        """r² of each token, for the Linears in a block with one attention."""
        if self.tokens == "equal":
            return {}
        names = {site.node: site.name for site in sites(graph_module)}
        heads = attentions(graph_module)
        attention_of: dict[Node, Node] = {}
        for block in blocks(graph_module):
            inside = [attention for attention in heads if names[attention.values] in block.names]
            if len(inside) == 1:
                attention_of |= {site.node: inside[0].softmax for site in found if site.name in block.names}
        scale: dict[Node, Tensor] = {}
        rows: dict[Node, torch.Size] = {}

        def look(node: Node, value: Tensor, *arguments: Any) -> None:
            if node in attention_of:
                rows[node] = arguments[0].shape[:-1]
            else:
                scale[node] = attention_concentration(value)

        watch = {
            node: (lambda value, *arguments, node=node: look(node, value, *arguments))
            for node in (*attention_of, *attention_of.values())
        }
        if watch:
            observe_calls(graph_module, OneBatch(images), watch, context.progress, "observe attention")
        return {
            node: scale[softmax].square()
            for node, softmax in attention_of.items()
            if rows[node] == scale[softmax].shape
        }
