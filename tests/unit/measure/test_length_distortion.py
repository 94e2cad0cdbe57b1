"""Curve lengths against what is known in closed form, and against a polygon of many points."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

from martlet.measure.length_distortion import length_distortion, without_norms

SIZE = (16, 16)
TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "num_classes": 0}


def vit(depth: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", depth=depth, **TINY)


def polygon(network: nn.Module, u: torch.Tensor, v: torch.Tensor, points: int) -> float:
    """The length of the closed polygon through the features of so many points, over that of the circle."""
    angles = 2 * math.pi * torch.arange(points + 1, dtype=torch.float64) / points
    with torch.no_grad():
        inputs = torch.cos(angles)[:, None, None, None] * u + torch.sin(angles)[:, None, None, None] * v
        features = torch.cat([network(part) for part in inputs.split(64)]).flatten(1)
    return float((features[1:] - features[:-1]).norm(dim=1).sum()) / (2 * math.pi)


def test_a_rotation_stretches_nothing_and_a_factor_by_itself() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -2.5 * x.flatten(1).flip(1)

    assert length_distortion(lambda _: Scaled(), SIZE, points=8) == pytest.approx(2.5, abs=1e-12)
    assert length_distortion(lambda _: nn.Sequential(nn.LayerNorm(16), Scaled()), SIZE) == pytest.approx(2.5)


def test_it_is_the_length_of_a_polygon_with_many_points() -> None:
    found = length_distortion(lambda seed: vit(2, seed), SIZE, points=256, repeats=1, seed=4)
    generator = torch.Generator().manual_seed(4)
    plane = torch.linalg.qr(torch.randn(3 * 256, 2, generator=generator, dtype=torch.float64)).Q
    u, v = plane.T.reshape(2, 3, *SIZE)
    network = without_norms(vit(2, 4)).double().eval()
    assert found == pytest.approx(polygon(network, u, v, 1024), rel=1e-4)
    with_norms = polygon(vit(2, 4).double().eval(), u, v, 1024)
    assert found != pytest.approx(with_norms, rel=0.1)  # norms count


def test_the_network_given_stays() -> None:
    network = vit(1, 0)
    without_norms(network)
    assert any(isinstance(module, nn.LayerNorm) for module in network.modules())
