"""What the families share: stem, stages, norm and classifier, with the interface that timm's models have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, NormMlpClassifierHead, trunc_normal_
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from martlet.core.errors import SourceError


def cfg(**kwargs: Any) -> Any:
    """An entry of `default_cfgs` of a model for ImageNet-1K without trained weights."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
    } | kwargs


def make(cls: type[Backbone], name: str, pretrained: bool, kwargs: dict[str, Any], **dims: Any) -> Any:
    """The registered model: its dimensions, changed by the caller's kwargs; `features_only` gives its stages.

    dims: by name; the family's constructor takes `depths`, one for each stage.
    """
    args = dims | kwargs
    feature_cfg = {"out_indices": tuple(range(len(args["depths"]))), "feature_cls": "getter"}
    return build_model_with_cfg(cls, name, pretrained, feature_cfg=feature_cfg, **args)


class Backbone(nn.Module):
    """A hierarchical classifier: images (B, 3, H, W) -> logits (B, K).

    `forward_features` gives (B, C, H / r, W / r), r the last `reduction`; every stage maps (B, C, H, W) to its own.

    Args:
        stages: One module each; `dims` are the channels they give. The stem divides H and W by `reduction`, each stage
            but the first by 2.
        norm: What comes after the last stage; None for a LayerNorm of what was pooled.
        divisor: H and W must be multiples of it; None for as much as the stages divide by.
        img_size: The only H and W, if parameters are as many as they say.
        global_pool: As timm's, `""` for none.
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        dims: Sequence[int],
        norm: nn.Module | None,
        reduction: int = 4,
        divisor: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        reductions = [reduction * 2**i for i in range(len(dims))]
        self.divisor = divisor or reductions[-1]
        self.img_size = None if img_size is None else pair(img_size)
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm or nn.Identity()
        head = ClassifierHead if norm else NormMlpClassifierHead
        self.head = head(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(init_weights_)

    def get_classifier(self) -> nn.Module:
        """The Linear that gives the logits."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, random classifier; 0 classes for none."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def check_size(self, x: Tensor) -> None:
        """Refuses images that the stages can't divide, or that the parameters weren't made for.

        Raises:
            SourceError: it names what the family takes.
        """
        h, w = x.shape[-2:]
        if self.img_size:
            check_only_size(self, x, self.img_size)
        if h % self.divisor or w % self.divisor:
            raise SourceError(
                f"{type(self).__name__} takes images whose sides are multiples of {self.divisor}, not {h} × {w}"
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, C, H / r, W / r), normalized."""
        self.check_size(x)
        return self.normalize(self.stages(self.stem(x)))

    def normalize(self, x: Tensor) -> Tensor:
        """The norm after the last stage: (B, C, H, W) -> the same."""
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives -> logits (B, K), or the pooled (B, C)."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What chosen stages give, each (B, C, H, W); as timm's models have it."""
        if output_fmt != "NCHW":
            raise ValueError(f"stages give NCHW, not {output_fmt}")
        self.check_size(x)
        taken, last = feature_take_indices(len(self.stages), indices)
        x, found = self.stem(x), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in taken:
                found.append(self.normalize(x) if norm and i == len(self.stages) - 1 else x)
            if stop_early and i == last:
                break
        return found if intermediates_only else (self.normalize(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what `indices` don't need; as timm's models have it."""
        taken, last = feature_take_indices(len(self.stages), indices)
        if prune_norm or last < len(self.stages) - 1:
            self.norm = nn.Identity()
        self.stages = self.stages[: last + 1]
        if prune_head or last < len(self.feature_info) - 1:
            self.reset_classifier(0, "")
        return taken


class Stage(nn.Module):
    """Downsampling and blocks: (B, C, H, W) -> (B, C', H', W').

    channels_last: the blocks take (B, H, W, C).
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], channels_last: bool = True) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if not self.channels_last:
            return self.blocks(x)
        return self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), in the layout of its parts."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.mixer = mixer
        self.norm2 = norm_layer(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SelfAttention(nn.Module):
    """Multi-head self-attention of all tokens. (B, H, W, C) -> the same.

    inner: channels of queries, keys and values, if not C.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, inner: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * (inner or dim), bias=qkv_bias)
        self.proj = nn.Linear(inner or dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(one, self.num_heads) for one in self.qkv(x.flatten(1, 2)).chunk(3, -1))
        return self.proj(merge_heads(scaled_dot_product_attention(q, k, v))).unflatten(1, x.shape[1:3])


class DepthwiseMlp(nn.Module):
    """An MLP with a depthwise 3 × 3 convolution before its activation. (B, H, W, C) -> the same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(gelu(x))


def check_only_size(model: nn.Module, x: Tensor, only: tuple[int, int]) -> None:
    """Refuses images (B, C, H, W) of another H and W than the model was made for.

    Raises:
        SourceError: it says how to make the model for these.
    """
    h, w = x.shape[-2:]
    if (h, w) != only:
        raise SourceError(
            f"this {type(model).__name__} takes images of {only[0]} × {only[1]}, not {h} × {w}; "
            f"make it with img_size=({h}, {w})"
        )


def init_weights_(module: nn.Module) -> None:
    """Linear layers as all these families have them: truncated normal of 0.02, no bias."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth: 0 to `rate`, linear over all blocks, stage by stage."""
    total = max(sum(depths) - 1, 1)
    return [[rate * (sum(depths[:s]) + i) / total for i in range(depth)] for s, depth in enumerate(depths)]


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of an `img_size`, which may be one side."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return torch.unflatten(x, -1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, D) -> (B, N, heads · D)."""
    return x.transpose(1, 2).flatten(2)
