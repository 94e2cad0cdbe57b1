"""A tiny variant of each family of the zoo, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from martlet import engine as engines
from martlet import models
from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Stage
from martlet.data.preprocess import Preprocess
from martlet.graph.trace import trace
from martlet.models.random_weights import randomize_
from martlet.techniques.quantize.int8 import Int8

Size = tuple[int, int]
CLASSES = 5


@dataclass(frozen=True)
class Family:
    """tiny: kwargs that make the smallest model with every kind of layer. others: sizes that it takes unchanged.

    refused: a size, and what the error says of those that fit. unreached: the end of the name of parameters that
    no gradient reaches, because the paper's classifier doesn't read what they do. hierarchical: it gives features of
    several stages. features_hear_logits: a new classifier changes what it reads.
    """

    tiny: Mapping[str, Any]
    size: Size
    others: tuple[Size, ...] = ()
    refused: tuple[Size, str] | None = None
    hierarchical: bool = True
    min_int8_sqnr_db: float = 15.0
    features_hear_logits: bool = False
    unreached: tuple[str, ...] = field(default=())


FAMILIES = {
    "cswin_tiny": Family(
        {"dim": 16, "depths": (1, 1), "num_heads": (2, 4), "stripes": (2,)},
        (32, 32),
        others=((32, 48), (24, 16)),
        refused=((32, 36), "multiples of 8, not 32 × 36"),
    ),
    "shiftvit_tiny": Family(
        {"dim": 24, "depths": (1, 1)},
        (32, 32),
        others=((40, 24),),
        refused=((32, 36), "multiples of 8, not 32 × 36"),
    ),
    "litv2_small": Family(
        {"dim": 16, "depths": (1, 1, 1), "num_heads": (2, 2, 4), "windows": (0, 2, 1), "alpha": 0.5},
        (32, 32),
        others=((32, 48),),
        refused=((32, 40), "multiples of 16, not 32 × 40"),
    ),
    "efficientmod_xxs": Family(
        {"dims": (16, 24), "depths": (2, 1), "attention": (0, 1), "attention_ratios": (2, 2)},
        (32, 32),
        others=((36, 43),),
    ),
    "cvt_13": Family(
        {"dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratio": 2.0},
        (32, 32),
        others=((36, 51),),
        unreached=tuple(f"stages.1.blocks.0.q.{end}" for end in ("conv.weight", "norm.weight", "norm.bias")),
    ),
    "uniformer_small": Family(
        {"dims": (16, 32), "depths": (1, 1), "head_dim": 16, "local": 1, "conv_stem": True},
        (32, 32),
        others=((40, 24),),
        refused=((32, 36), "multiples of 8, not 32 × 36"),
    ),
    "spectformer_h_small": Family(
        {
            "img_size": (32, 40),
            "stem_dim": 8,
            "dims": (16, 32),
            "depths": (1, 1),
            "num_heads": (2, 2),
            "mlp_ratios": (2, 2),
            "spectral": 1,
        },
        (32, 40),
        refused=((32, 32), r"takes images of 32 × 40, not 32 × 32; make it with img_size=\(32, 32\)"),
    ),
    "svt_h_small": Family(
        {
            "img_size": (32, 48),
            "stem_dim": 8,
            "dims": (16, 32),
            "depths": (1, 1),
            "num_heads": (2, 2),
            "mlp_ratios": (2, 2),
            "spectral": 1,
        },
        (32, 48),
        refused=((32, 32), r"takes images of 32 × 48, not 32 × 32; make it with img_size=\(32, 32\)"),
    ),
    "kat_tiny_patch16_224": Family(
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        (32, 32),
        refused=((32, 40), r"takes images of 32 × 32, not 32 × 40; make it with img_size=\(32, 40\)"),
        hierarchical=False,
    ),
    "fcaformer_l1": Family(
        {"img_size": (32, 40), "dims": (16, 32), "depths": (1, 3), "num_heads": (0, 2), "mlp_ratio": 2.0},
        (32, 40),
        refused=((32, 32), r"takes images of 32 × 40, not 32 × 32; make it with img_size=\(32, 32\)"),
    ),
    "sret_tiny": Family(
        {
            "img_size": (64, 48),
            "dims": (16, 32),
            "depths": (1, 1),
            "num_heads": (2, 2),
            "groups": ((4, 2), (1, 1)),
            "mlp_ratio": 2.0,
        },
        (64, 48),
        refused=((64, 64), r"takes images of 64 × 48, not 64 × 64; make it with img_size=\(64, 64\)"),
    ),
    "fastervit_0": Family(
        {
            "img_size": (32, 48),
            "stem_dim": 8,
            "dim": 16,
            "depths": (1, 2),
            "num_heads": (2, 2),
            "convs": 1,
            "hat": (False, True),
            "window": 2,
            "carriers": 1,
            "mlp_ratio": 2.0,
            "layer_scale": 0.5,
            "propagate": True,
        },
        (32, 48),
        refused=((32, 32), r"takes images of 32 × 48, not 32 × 32; make it with img_size=\(32, 32\)"),
    ),
    "hyena_deit_tiny_patch16_224": Family(
        {"img_size": (32, 40), "patch": 4, "dim": 16, "depths": (2, 2), "attention": 1, "num_heads": 2},
        (32, 40),
        refused=((32, 32), r"takes images of 32 × 40, not 32 × 32; make it with img_size=\(32, 32\)"),
    ),
    "medvit_v2_tiny": Family(
        {"dims": (32, 128), "depths": (1, 2), "pattern": ("L", "LG"), "dilations": (1, 2), "pools": (1, 2)},
        (128, 128),
        others=((128, 160),),
        refused=((32, 128), "a neighbourhood of 7 × 7, 2 apart, is larger than the feature map of 4 × 16"),
    ),
    "fit_tiny_patch8_224": Family(
        {
            "img_size": (32, 48),
            "group": 2,
            "latents": 3,
            "dim": 32,
            "latent_dim": 16,
            "local": (1, 1, 1),
            "globally": (1, 1),
            "num_heads": 2,
            "latent_heads": 2,
            "mlp_ratio": 2.0,
        },
        (32, 48),
        refused=((32, 32), r"takes images of 32 × 48, not 32 × 32; make it with img_size=\(32, 32\)"),
        hierarchical=False,
    ),
    "vitar_small_patch16_224": Family(
        {"patch": 4, "grid": 4, "dim": 32, "depth": 2, "num_heads": 2},
        (36, 32),
        others=((16, 16), (64, 44)),
        refused=((12, 32), "at least 16 × 16, not 12 × 32"),
        hierarchical=False,
    ),
    "efficientvmamba_tiny": Family(
        {"dim": 16, "depths": (1, 1), "scans": 1, "states": 2},
        (32, 32),
        others=((24, 48),),
        refused=((32, 36), "multiples of 8, not 32 × 36"),
    ),
    "lookup_vit_small_patch16_224": Family(
        {"img_size": (28, 20), "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "compressed": 3},
        (28, 20),
        refused=((32, 20), r"takes images of 28 × 20, not 32 × 20; make it with img_size=\(32, 20\)"),
        hierarchical=False,
        min_int8_sqnr_db=9.0,  # logits are means of many tokens, smaller than these and their errors
    ),
    "stvit_r_swin_small_patch4_window7_224": Family(
        {
            "img_size": (32, 64),
            "dim": 16,
            "depths": (2, 6),
            "num_heads": (2, 2),
            "window": 4,
            "semantic": 1,
            "samples": 2,
            "overlap": 2,
            "mlp_ratio": 2.0,
        },
        (32, 64),
        refused=((32, 32), r"takes images of 32 × 64, not 32 × 32; make it with img_size=\(32, 32\)"),
    ),
    "dyn_perceiver_regnety_008": Family(
        {
            "host": "regnety_002",
            "host_args": {"w0": 16, "wa": 16.0, "wm": 1.4, "depth": 4, "group_size": 8, "stem_width": 16},
            "tokens": 16,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 4),
            "grid": 2,
            "hidden": 24,
        },
        (32, 32),
        others=((32, 64),),
        refused=((32, 40), "multiples of 32, not 32 × 40"),
        unreached=tuple(f"own.{end}" for end in ("0.0.weight", "0.0.bias", "1.weight", "1.bias")),
        features_hear_logits=True,
    ),
}


@cache
def tiny(name: str) -> nn.Module:
    """The variant with every parameter and statistic random, in inference mode. Not to be changed."""
    torch.manual_seed(0)
    module = models.create(name, num_classes=CLASSES, **FAMILIES[name].tiny).eval()
    randomize_(module, seed=1)
    return module


@cache
def traced(name: str) -> Model:
    """Its graph, batch norms folded. Not to be changed."""
    size, kept = FAMILIES[name].size, Preprocess(size=FAMILIES[name].size)
    graph = trace(tiny(name), size)
    return Model(name=name, module=graph, preprocess=kept, num_classes=CLASSES, origin={}, stage=Stage.GRAPH)


def images(size: Size, batch: int = 2) -> torch.Tensor:
    """(batch, 3, H, W) of noise."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2))


class Noise:
    """Calibration images."""

    num_images = 8

    def __init__(self, size: Size) -> None:
        self.size = size

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield images(self.size, self.num_images)


def int8(name: str) -> Model:
    """It, quantized for OpenVINO."""
    context = Context(images=Noise(FAMILIES[name].size), int8=engines.get("openvino").int8)
    return pipeline.run(traced(name), Recipe((Int8(),)), context)
