"""Multi-head attention of any shape: what takes a library's own place once heads or their dimensions are cut."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class RelativePosition(nn.Module):
    """What is added to the scores of tokens in a window (h, w), by how far apart they are.

    table: ((2h - 1)(2w - 1), H), the biases; row (dy + h - 1)(2w - 1) + dx + w - 1 belongs to the offset (dy, dx) from
    key to query.
    """

    index: Tensor

    def __init__(self, window: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), num_heads))
        self.register_buffer("index", relative_index(window).flatten(), persistent=False)

    def forward(self) -> Tensor:
        """(1, H, N, N) for the N = h w tokens in row order."""
        count = self.window[0] * self.window[1]
        return self.table[self.index].view(count, count, -1).permute(2, 0, 1).unsqueeze(0)

    @torch.no_grad()
    def set_(self, bias: Tensor) -> None:
        """Takes the table from what it gives, (H, N, N)."""
        self.table[self.index] = bias.flatten(1).mT.to(self.table)


def _mixed(mix: Tensor, x: Tensor) -> Tensor:
    """Of each head the sum over all with the weights in its row of mix (H, H); x (B, H, N, N)."""
    return (mix @ x.flatten(2)).unflatten(-1, x.shape[2:])


class Slots(nn.Module):
    """K weighted sums of N keys, and of N values, over the tokens of an image; and what is added to each sum's scores.

    key, value: (K, N), the weights. bias: (K,), so that a sum of several tokens can count as several.
    """

    def __init__(self, num_tokens: int, num_slots: int) -> None:
        super().__init__()
        self.key, self.value = (nn.Parameter(torch.zeros(num_slots, num_tokens)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(num_slots))

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, D), (B, H, N, E) -> (B, H, K, D), (B, H, K, E)."""
        return functional.linear(k.mT, self.key).mT, functional.linear(v.mT, self.value).mT

    @torch.no_grad()
    def set_(self, groups: Tensor) -> None:
        """Makes each sum the mean of a group of tokens, that counts as so many as it has. groups: (N,), below K."""
        members = torch.nn.functional.one_hot(groups, len(self.bias)).T.to(self.bias)  # (K, N)
        count = members.sum(1)
        for weights in (self.key, self.value):
            weights.copy_(members / count[:, None])
        self.bias.copy_(count.log())


def relative_index(window: tuple[int, int]) -> Tensor:
    """(N, N): the row of the table for each query and key of a window (h, w)."""
    height, width = window
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    down, across = y[:, None] - y + height - 1, x[:, None] - x + width - 1  # (N, N)
    return down * (2 * width - 1) + across


class ShapedAttention(nn.Module):
    """proj(norm(softmax(scale q kᵀ + position) v)), with dimensions of q and k, and of v, that need not be equal.

    One Linear gives q, k and v, because x is then read once. Rows: q of head 0, 1, …, then k, then v.
    How a library calls its attention, and what it wants back, is for the adapters of `vit/` to say in a subclass.

    Args:
        dim: C, features of each token.
        num_heads, qk_dim, v_dim: H heads, of D dimensions of q and k, and E of v.
        scale: of the scores; that of the attention that was there before, whatever D is now.
        query_norm, key_norm: over D; norm: over all H E, before proj.
        window: (h, w), if there is a relative position bias.
        slots: (N, K), if queries see K weighted sums of the N keys and values in their place (Linformer); the weights
            are the same for all heads. Only for so many tokens, and without window.
        mixed: heads are mixed, before the softmax and after it, each by a matrix (H, H) that begins as the identity.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_dim: int,
        v_dim: int,
        scale: float,
        *,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
        norm: nn.Module | None = None,
        window: tuple[int, int] | None = None,
        slots: tuple[int, int] | None = None,
        mixed: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dim, self.scale = num_heads, qk_dim, v_dim, scale
        self.qkv = nn.Linear(dim, num_heads * (2 * qk_dim + v_dim))
        self.q_norm, self.k_norm, self.norm = (each or nn.Identity() for each in (query_norm, key_norm, norm))
        self.position = RelativePosition(window, num_heads) if window else None
        self.slots = Slots(*slots) if slots else None
        self.mix = nn.ParameterList(torch.eye(num_heads) for _ in range(2)) if mixed else None
        self.proj = nn.Linear(num_heads * v_dim, dim)

    @property
    def rows(self) -> tuple[slice, slice, slice]:
        """Those of q, k and v in `qkv`."""
        q = self.num_heads * self.qk_dim
        return slice(0, q), slice(q, 2 * q), slice(2 * q, cast(int, self.qkv.out_features))

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C).

        mask: what is added to the scores; (W, N, N) for the W windows of each image, (B, 1 or H, N, N) else.
        """
        count = x.shape[1]
        sizes = [self.num_heads * self.qk_dim] * 2 + [self.num_heads * self.v_dim]
        q, k, v = (
            y.unflatten(-1, (self.num_heads, size // self.num_heads)).transpose(1, 2)  # (B, H, N, D) or (B, H, N, E)
            for y, size in zip(self.qkv(x).split(sizes, -1), sizes, strict=True)
        )
        if self.position is not None:
            bias = self.position()
            if mask is not None:
                windows = mask[None, :, None].expand(x.shape[0] // mask.shape[0], -1, -1, -1, -1)
                bias = bias + windows.reshape(-1, 1, count, count)  # (B, H, N, N)
            mask = bias
        q, k = self.q_norm(q), self.k_norm(k)
        if self.slots is not None:
            (k, v), mask = self.slots(k, v), self.slots.bias[None, None, None]  # (1, 1, 1, K)
        if self.mix is None:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        else:
            scores = _mixed(self.mix[0], self.scale * q @ k.mT)  # (B, H, N, N)
            out = _mixed(self.mix[1], (scores if mask is None else scores + mask).softmax(-1)) @ v
        return self.proj(self.norm(out.transpose(1, 2).flatten(2)))  # (B, N, H E) -> (B, N, C)
