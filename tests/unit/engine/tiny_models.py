"""Tiny models, their MACs by hand, and their quantization."""

from collections.abc import Iterator

import torch
from torch import nn

from martlet import engine as engines
from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.techniques.quantize.int8 import Int8


class Noise:
    """Calibration images."""

    num_images = 8

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            yield torch.randn(4, 3, *self.size, generator=generator)


class ConvNet(nn.Module):
    """Plain, strided, depthwise and transposed convolutions, a batch norm, a scale and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)  # 16 x 16
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.scale = nn.Parameter(torch.full((1, 24, 1, 1), 0.5))
        self.up = nn.ConvTranspose2d(24, 8, 2, stride=2)  # 32 x 32
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.pointwise(torch.relu(self.depthwise(x))) * self.scale
        return self.head(self.up(x).amax((2, 3)))


CONV_MACS = 16 * 16 * (16 * 3 * 9 + 16 * 9 + 24 * 16 + 24 * 8 * 4) + 8 * 5
# 17 tokens of 48 in 3 heads of 16, 2 blocks: patches, qkv + proj, two products, MLP; head.
VIT_MACS = 16 * 48 * 192 + 2 * (17 * 48 * 48 * 4 + 2 * 3 * 17 * 17 * 16 + 2 * 17 * 48 * 192) + 48 * 10
VIT_ATTENTION_MACS = 2 * 2 * 3 * 17 * 17 * 16


def quantized(model: Model, engine: str, **settings: object) -> Model:
    context = Context(images=Noise(model.preprocess.size), int8=engines.get(engine).int8)
    return pipeline.run(model, Recipe((Int8(**settings),)), context)  # type: ignore[arg-type]
