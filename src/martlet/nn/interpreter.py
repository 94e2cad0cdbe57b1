"""The multi-head interpreter: how much each patch tells, by a query and keys of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.vit.view import BlockView, LinearView


class Interpreter(nn.Module):
    """I_j = mean over heads of sigmoid(scale q k_j), q of the class token and k_j of patch j, from x without its scale.

    It begins as the attention of the block that it stands before, whose query and keys it copies, the weights of that
    block's LayerNorm taken in.
    Source: Pan et al., IA-RED², 2021, arXiv 2106.12620, section 3.2, equations 2 and 3.
    """

    def __init__(self, block: BlockView) -> None:
        super().__init__()
        attention = block.attention
        self.heads, self.scale = attention.num_heads, attention.scale
        norm = None if block.post_norm else block.norm1.module
        self.query, self.key = (_copy(each, norm) for each in (attention.query, attention.key))

    def forward(self, x: Tensor, first: int) -> Tensor:
        """Of the patches of x (B, N, C), which begin at token `first`: (B, N - first), between 0 and 1."""
        x = functional.layer_norm(x, x.shape[-1:])
        query = self.query(x[:, :1]).unflatten(-1, (self.heads, -1))  # (B, 1, H, D)
        key = self.key(x[:, first:]).unflatten(-1, (self.heads, -1))  # (B, N - first, H, D)
        return ((query * key).sum(-1) * self.scale).sigmoid().mean(-1)


def _copy(map_: LinearView, norm: nn.Module | None) -> nn.Linear:
    """W (g y + b) + c as a Linear of y, y being what the norm gives before its weights g and b."""
    weight, bias = map_.weight.detach(), map_.bias
    copy = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        copy.bias.zero_() if bias is None else copy.bias.copy_(bias)
        if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
            if norm.bias is not None:
                copy.bias.add_(weight @ norm.bias)
            weight = weight * norm.weight
        copy.weight.copy_(weight)
    return copy
