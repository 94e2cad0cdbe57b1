"""STViT-R Swin: most blocks of the third stage work on a few semantic tokens, from which the image's are recovered."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import ConvNormAct, DropPath, LayerNorm2d, LayerScale, Mlp
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, scaled_dot_product_attention

from martlet.core.errors import SourceError
from martlet.models.backbone import Backbone, Stage, cfg, drop_path_rates, make, merge_heads, pair, split_heads
from martlet.models.papers.paper import Paper, Stated

__all__ = ["STViTSwin"]

PAPER = Paper(
    title="Making Vision Transformers Efficient from A Token Sparsification View",
    authors="Chang et al.",
    year=2023,
    arxiv="2303.08685",
    code="https://github.com/changsn/STViT-R",
    license="MIT",
    models={
        "stvit_r_swin_small_patch4_window7_224": Stated(params="49.626M", macs="5.826G", top1_pct=82.7),
        "stvit_r_swin_base_patch4_window7_224": Stated(params="87.812M", macs="10.264G", top1_pct=83.2),
    },
    differs="The paper's abstract was at hand, not its text; figures are those of the authors' training logs, of "
    "models without learned global centers, as here. DeiT's form is the technique `stvit`.",
)

default_cfgs = generate_default_cfgs({name: cfg(first_conv="stem.0.conv") for name in PAPER.models})

SCALE = 1e-5
"""What layer scales begin with."""


class AttendBlock(nn.Module):
    """Tokens (B, N, C) attend to others (B, M, C), and go through an MLP.

    residual: what attention gives is added to the tokens; without it, it takes their place.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, residual: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.residual = residual
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.scale1, self.scale2 = LayerScale(dim, SCALE), LayerScale(dim, SCALE)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        q = split_heads(self.q(self.norm1(x)), self.num_heads)
        k, v = (split_heads(one, self.num_heads) for one in self.kv(self.norm1(others)).chunk(2, -1))
        found = self.scale1(self.proj(merge_heads(scaled_dot_product_attention(q, k, v))))
        x = x + self.drop_path(found) if self.residual else found
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class SemanticBlocks(nn.Module):
    """Six blocks in the place of Swin's: local, gather, gather, within, among, recover. (B, H, W, C) -> the same.

    Each window of `window` × `window` begins `samples` × `samples` semantic tokens as maxima over its cells. They
    gather from a larger window, which reaches `overlap` over its edges, then from the whole image and one another;
    attend to those of their window, then to all; and the image's tokens attend to them.
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        dim: int,
        size: tuple[int, int],
        num_heads: int,
        window: int,
        samples: int,
        overlap: int,
        mlp_ratio: float,
        drop_path: list[float],
    ) -> None:
        super().__init__()
        self.window, self.samples = window, samples
        self.larger = min(window + overlap, *size)
        self.local = SwinTransformerBlock(
            dim, size, num_heads, window_size=window, mlp_ratio=mlp_ratio, drop_path=drop_path[0]
        )
        self.gather = AttendBlock(dim, num_heads, mlp_ratio, drop_path[1], residual=False)
        self.center, self.within, self.among, self.recover = (
            AttendBlock(dim, num_heads, mlp_ratio, rate) for rate in drop_path[2:]
        )
        for axis, side in zip(("rows", "columns"), size, strict=True):
            self.register_buffer(axis, torch.cat(self._reach(side)), persistent=False)

    def _reach(self, side: int) -> list[Tensor]:
        """Places along one side of each larger window, which lie evenly from end to end."""
        n = side // self.window
        starts = [round(i * (side - self.larger) / max(n - 1, 1)) for i in range(n)]
        return [start + torch.arange(self.larger) for start in starts]

    def forward(self, x: Tensor) -> Tensor:
        h, w = (side // self.window * self.samples for side in x.shape[1:3])
        x = self.local(x)
        semantic = self.gather(*self.windows(x))  # (B · windows, samples², C)
        grid = window_reverse(semantic.unflatten(1, (self.samples, -1)), (self.samples, self.samples), h, w)
        semantic, image = grid.flatten(1, 2), x.flatten(1, 2)  # (B, h w, C), (B, H W, C)
        semantic = self.center(semantic, torch.cat([semantic, image], 1))
        inside = window_partition(semantic.unflatten(1, (h, w)), (self.samples, self.samples)).flatten(1, 2)
        inside = self.within(inside, inside)
        grid = window_reverse(inside.unflatten(1, (self.samples, -1)), (self.samples, self.samples), h, w)
        semantic = grid.flatten(1, 2)
        semantic = self.among(semantic, semantic)
        return self.recover(image, semantic).unflatten(1, x.shape[1:3])

    def windows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) -> first semantic tokens (B · windows, samples², C), and with them what they attend to."""
        stride = self.window // self.samples
        own = window_partition(x, (self.window, self.window)).permute(0, 3, 1, 2)
        first = max_pool2d(own, self.window - (self.samples - 1) * stride, stride).flatten(2).mT
        larger = x.index_select(1, self.rows).index_select(2, self.columns)
        larger = window_partition(larger, (self.larger, self.larger)).flatten(1, 2)  # (B · windows, larger², C)
        return first, torch.cat([first, larger], 1)


class STViTSwin(Backbone):
    """Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View", arXiv:2303.08685.

    STViT-R on Swin. Images of one size (`img_size`), whose sides are multiples of 16 times `window`. The stem is two
    convolutions, which divide by 4, and not Swin's patches.

    Args:
        semantic: The stage, counted from 0, whose blocks are six by six those of `SemanticBlocks`.
        samples: Semantic tokens along the side of a window, nine by default.
        overlap: How far the windows from which they gather reach further.

    Raises:
        SourceError: windows don't fit into the images, or blocks not into sixes.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        semantic: int = 2,
        samples: int = 3,
        overlap: int = 3,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        size, divisor = pair(img_size), 4 * 2**semantic * window
        if size[0] % divisor or size[1] % divisor:
            raise SourceError(
                f"{type(self).__name__} takes images whose sides are multiples of {divisor}, not {size[0]} × {size[1]}"
            )
        if depths[semantic] % 6:
            raise SourceError(f"stage {semantic} has blocks by sixes, not {depths[semantic]}")
        stem = nn.Sequential(
            ConvNormAct(in_chans, dim // 2, 3, stride=2, padding=1, act_layer=nn.Hardswish),
            ConvNormAct(dim // 2, dim, 3, stride=2, padding=1, act_layer=nn.Hardswish),
        )
        dims, stages, rates = [dim * 2**i for i in range(len(depths))], [], drop_path_rates(drop_path_rate, depths)
        for i, (c, heads, its) in enumerate(zip(dims, num_heads, rates, strict=True)):
            here = (size[0] // (4 * 2**i), size[1] // (4 * 2**i))
            blocks: list[nn.Module] = [PatchMerging(c // 2, c)] if i else []
            if i == semantic:
                blocks += [
                    SemanticBlocks(c, here, heads, window, samples, overlap, mlp_ratio, its[start : start + 6])
                    for start in range(0, len(its), 6)
                ]
            else:
                blocks += [
                    SwinTransformerBlock(
                        c,
                        here,
                        heads,
                        window_size=window,
                        shift_size=window // 2 if j % 2 else 0,
                        mlp_ratio=mlp_ratio,
                        drop_path=rate,
                    )
                    for j, rate in enumerate(its)
                ]
            stages.append(Stage(nn.Identity(), blocks))
        super().__init__(stem=stem, stages=stages, dims=dims, norm=LayerNorm2d(dims[-1]), img_size=size, **kwargs)


@register_model
def stvit_r_swin_small_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-R-Swin-S."""
    return make(STViTSwin, "stvit_r_swin_small_patch4_window7_224", pretrained, kwargs, depths=(2, 2, 18, 2))


@register_model
def stvit_r_swin_base_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> STViTSwin:
    """STViT-R-Swin-B."""
    dims: dict[str, Any] = {"dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return make(STViTSwin, "stvit_r_swin_base_patch4_window7_224", pretrained, kwargs, **dims)
