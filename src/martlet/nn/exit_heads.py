"""Heads of exits: from the tokens between two blocks to logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Readout(NamedTuple):
    """How heads read tokens: patches (B, N, C) after so many others, the first few of which stand for the image.

    num_prefix: class, distillation and register tokens. num_class: of these, class and distillation tokens.
    grid: of the patches (down, across); None if they have no places. Tokens (B, H, W, C) have theirs from their shape.
    """

    num_prefix: int
    num_class: int
    grid: tuple[int, int] | None = None

    def split(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """The mean of class tokens (B, C), if there are any, and the patches (B, N, C)."""
        x = x.flatten(1, -2)
        patches = x[:, self.num_prefix :] if self.num_prefix else x
        return (x[:, : self.num_class].mean(1) if self.num_class else None), patches

    def image(self, x: Tensor) -> Tensor:
        """What stands for the image (B, C): the mean of its class tokens, or of its patches where it has none."""
        token, patches = self.split(x)
        return patches.mean(1) if token is None else token

    def places(self, x: Tensor) -> tuple[int, int]:
        """The grid (down, across) of the patches in x."""
        if x.ndim == 4:  # (B, H, W, C)
            return x.shape[1], x.shape[2]
        assert self.grid is not None
        return self.grid


class LinearHead(nn.Module):
    """Tokens to logits by a norm and one Linear, from the class token, or the mean of the patches."""

    def __init__(self, channels: int, classes: int, readout: Readout) -> None:
        super().__init__()
        self.readout = readout
        self.norm = nn.LayerNorm(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.readout.image(x)))


class PerceptionHead(nn.Module):
    """What convolutions make of the patches, averaged, with the class token, to logits.

    x + BN(W2 BN(GELU(D BN(GELU(W1 x))))), in which D is a depthwise convolution of 3 × 3, or is left out with its norm.
    """

    def __init__(self, channels: int, classes: int, readout: Readout, wide: bool) -> None:
        super().__init__()
        self.readout = readout
        layers: list[nn.Module] = [nn.Conv2d(channels, channels, 1), nn.GELU(), nn.BatchNorm2d(channels)]
        if wide:
            layers += [nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.GELU()]
            layers += [nn.BatchNorm2d(channels)]
        self.convs = nn.Sequential(*layers, nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.fc = nn.Linear(channels, classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, N, C) of the patches."""
        _, patches = self.readout.split(x)
        image = patches.mT.unflatten(2, self.readout.places(x))  # (B, C, H, W)
        return patches + self.convs(image).flatten(2).mT

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(_joined(self.readout, x, self.features(x)))


class AggregationHead(nn.Module):
    """What attention makes of every s-th patch, down and across, averaged, with the class token, to logits."""

    def __init__(self, channels: int, classes: int, readout: Readout, stride: int, num_heads: int) -> None:
        super().__init__()
        self.readout, self.stride, self.num_heads = readout, stride, num_heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)
        self.fc = nn.Linear(channels, classes)

    def sampled(self, x: Tensor) -> Tensor:
        """The patches (B, M, C) that take part."""
        _, patches = self.readout.split(x)
        down, across = self.readout.places(x)
        rows = [i * across + j for i in range(0, down, self.stride) for j in range(0, across, self.stride)]
        return patches[:, rows]

    def features(self, x: Tensor) -> Tensor:
        """(B, M, C) of the patches that take part."""
        qkv = self.qkv(self.sampled(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, M, D)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(_joined(self.readout, x, self.features(x)))


def _joined(readout: Readout, x: Tensor, features: Tensor) -> Tensor:
    """The mean (B, C) of the features (B, M, C), and the class token, if there is one."""
    token, _ = readout.split(x)
    return features.mean(1) if token is None else features.mean(1) + token


class DepthGate(nn.Module):
    """At which of several places an image should leave, from the mean of tokens (B, …, C) that come early.

    Gives how sure it is, from 0 to 1, of each place but the last that images should have left by then (B, E): one half
    or more from the likeliest place on.
    """

    def __init__(self, channels: int, places: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, places)

    def forward(self, x: Tensor) -> Tensor:
        p = self.fc(x.flatten(1, -2).mean(1)).softmax(1)  # (B, E + 1)
        ahead = [p[:, : k + 1].amax(1) - p[:, k + 1 :].amax(1) for k in range(p.shape[1] - 1)]
        return (1 + torch.stack(ahead, 1)) / 2
