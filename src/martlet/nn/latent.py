"""A latent code beside a network: it reads the network's features and computes for itself, and the features read it."""

from __future__ import annotations

from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention


class Attend(nn.Module):
    """Tokens (B, N, C) attend to others (B, M, C'), and go through an MLP; both are added.

    inner: channels of queries, keys and values, if not C. places: M, if keys have learned positions.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        mlp_ratio: float = 1.0,
        other_dim: int | None = None,
        inner: int | None = None,
        places: int | None = None,
    ) -> None:
        super().__init__()
        inner, other = inner or dim, other_dim or dim
        self.num_heads = num_heads
        self.norm_q = nn.LayerNorm(dim)
        self.norm_kv = nn.LayerNorm(other) if other_dim else None
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for width in (dim, other, other))
        self.proj = nn.Linear(inner, dim)
        self.position = nn.Parameter(self.proj.weight.new_zeros(1, places, inner)) if places else None
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor, others: Tensor | None = None) -> Tensor:
        q = self.norm_q(x)
        kv = q if others is None or self.norm_kv is None else self.norm_kv(others)
        k = self.k(kv) if self.position is None else self.k(kv) + self.position
        q, k, v = (one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in (self.q(q), k, self.v(kv)))
        seen = scaled_dot_product_attention(q, k, v)  # (B, heads, N, D)
        x = x + self.proj(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Read(nn.Module):
    """The code Z (B, N, C) attends to the features X (B, C, H, W), pooled to `grid` cells, and then to itself.

    Before they are pooled a depthwise 7 × 7 convolution is added to them.
    """

    def __init__(self, dim: int, grid: tuple[int, int], depth: int, num_heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.cross = Attend(dim, other_dim=dim, places=grid[0] * grid[1])
        self.blocks = nn.Sequential(*(Attend(dim, num_heads, mlp_ratio=4.0) for _ in range(depth)))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        (down, across), (h, w) = self.grid, x.shape[-2:]
        pooled = avg_pool2d(x + self.conv(x), (h // down, w // across))
        return self.blocks(self.cross(z, pooled.flatten(2).mT))


class Shrink(nn.Module):
    """Half of the tokens, each a mixture of all, with the channels of the next stage. (B, N, C) -> (B, N / 2, C')."""

    def __init__(self, tokens: int, dim: int, out: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.LayerNorm(tokens), nn.Linear(tokens, tokens // 2))
        self.expand = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, out))

    def forward(self, z: Tensor) -> Tensor:
        return self.expand(self.mix(z.mT).mT)


class Transfer(nn.Module):
    """What an exit thought, for the next one. Logits (B, K) -> (B, C)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(num_classes, dim), nn.BatchNorm1d(dim)

    def forward(self, logits: Tensor) -> Tensor:
        return self.norm(self.fc(logits)).relu()
