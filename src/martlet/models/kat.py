"""KAT: a ViT whose MLPs have learned rational functions, one for a group of channels, in the place of GELU."""

from __future__ import annotations

from functools import cache
from math import erf
from typing import Any

import numpy as np
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from martlet.models.backbone import cfg, check_only_size
from martlet.models.papers.paper import Paper, Stated

__all__ = ["KAT"]

RATIONAL = {
    "macs": "the paper adds 21 operations for each value of a rational function and 5 for each that is normalized; "
    "counted so, it agrees to the last digit, as those of S and B do"
}

PAPER = Paper(
    title="Kolmogorov-Arnold Transformer",
    authors="Yang and Wang",
    year=2024,
    arxiv="2409.10594",
    code="https://github.com/Adamdad/kat",
    license="Apache-2.0",
    models={
        "kat_tiny_patch16_224": Stated(
            params="5.7M", macs="1.13G", top1_pct=74.6, counts_attention=False, differs=RATIONAL
        ),
        "kat_small_patch16_224": Stated(params="22.1M", macs="4.35G", top1_pct=81.2, counts_attention=False),
        "kat_base_patch16_224": Stated(params="86.6M", macs="17.06G", top1_pct=82.3, counts_attention=False),
    },
    differs="GELU's rational function is fitted here, not the authors' table.",
)

default_cfgs = generate_default_cfgs(
    {name: cfg(first_conv="patch_embed.proj", classifier="head") for name in PAPER.models}
)


@cache
def fitted_gelu() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Coefficients a_0 … a_5 and b_1 … b_4 of GELU on [-6, 6], by least squares; odd b are 0."""
    x = np.linspace(-6, 6, 1201)
    y = x * (1 + np.vectorize(erf)(x / 2**0.5)) / 2
    powers, below = x[:, None] ** np.arange(6), np.ones_like(x)
    solution = np.zeros(8)
    for _ in range(10):  # Sanathanan and Koerner: P - y Q, relative to the last Q
        design = np.concatenate([powers, -y[:, None] * powers[:, [2, 4]]], 1)
        solution = np.linalg.lstsq(design / below[:, None], y / below, rcond=None)[0]
        below = 1 + np.abs(powers[:, [2, 4]] @ solution[6:])
    a, (b2, b4) = solution[:6], solution[6:]
    return tuple(map(float, a)), (0.0, float(b2), 0.0, float(b4))


class GroupRational(nn.Module):
    """(a_0 + a_1 x + … + a_5 x⁵) / (1 + |b_1 x + … + b_4 x⁴|) (eq. 8 and 9). (…, C) -> the same.

    a is shared by all channels, b is its group's. The derivative of |0| is taken to be 1, so that b learns from zero.

    Args:
        start: `identity` or `gelu`, what it computes before training.
    """

    def __init__(self, start: str, groups: int = 8) -> None:
        super().__init__()
        a, b = fitted_gelu() if start == "gelu" else ((0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0,) * 4)
        self.numerator = nn.Parameter(torch.tensor(a))
        self.denominator = nn.Parameter(torch.tensor(b).repeat(groups, 1))  # (groups, 4)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (len(self.denominator), -1))  # (…, groups, C / groups)
        a, b = self.numerator.unbind(), self.denominator.unsqueeze(-1).unbind(1)
        above = a[5]
        for coefficient in a[4::-1]:  # Horner
            above = above * groups + coefficient
        below = b[3]
        for coefficient in b[2::-1]:
            below = below * groups + coefficient
        below = below * groups
        return (above / (1 + torch.where(below < 0, -below, below))).flatten(-2)


class GroupRationalKan(nn.Module):
    """Two layers of GR-KAN (eq. 10): rational functions, then a Linear. What timm's block calls its MLP."""

    def __init__(self, in_features: int, hidden_features: int, drop: float = 0.0, bias: bool = True, **_: Any) -> None:
        super().__init__()
        self.act1 = GroupRational("identity")
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act2 = GroupRational("gelu")
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act2(self.fc1(self.drop(self.act1(x))))))


class KAT(VisionTransformer):
    """Yang and Wang, "Kolmogorov-Arnold Transformer", arXiv:2409.10594, section 4. Sizes as timm's ViT: `img_size`.

    The weights of a ViT fit, and give nearly its logits, as all rational functions start as what they replace.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(mlp_layer=GroupRationalKan, **kwargs)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images (B, 3, H, W) -> (B, 1 + N, C), normalized.

        Raises:
            SourceError: images of another size than the position embedding has.
        """
        check_only_size(self, x, self.patch_embed.img_size)
        return super().forward_features(x, attn_mask, is_causal)


def _make(name: str, pretrained: bool, kwargs: dict[str, Any], dim: int, num_heads: int) -> KAT:
    dims: dict[str, Any] = {"patch_size": 16, "embed_dim": dim, "depth": 12, "num_heads": num_heads}
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(
        KAT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **(dims | kwargs)
    )


@register_model
def kat_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> KAT:
    """KAT-T."""
    return _make("kat_tiny_patch16_224", pretrained, kwargs, 192, 3)


@register_model
def kat_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> KAT:
    """KAT-S."""
    return _make("kat_small_patch16_224", pretrained, kwargs, 384, 6)


@register_model
def kat_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> KAT:
    """KAT-B."""
    return _make("kat_base_patch16_224", pretrained, kwargs, 768, 12)
