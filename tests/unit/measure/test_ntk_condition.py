"""The tangent kernel's condition against kernels known in closed form, and against differences of a real network."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from martlet.measure.ntk_condition import ntk_condition

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 3, "depth": 1, "num_classes": 0}


def images(n: int, side: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def condition(kernel: torch.Tensor) -> float:
    values = torch.linalg.eigvalsh(kernel)
    return float(values[-1] / values[0])


def test_of_a_linear_network_it_is_that_of_the_images() -> None:
    def linear(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4, 5))

    x = images(6, side=2)
    flat = x.flatten(1).double()
    assert ntk_condition(linear, x) == pytest.approx(condition(flat @ flat.T), rel=1e-9)
    assert ntk_condition(linear, x) != pytest.approx(condition(flat @ flat.T + 1), rel=1e-3)  # the bias counts for none
    assert ntk_condition(linear, x[[0, 1, 0]]) == float("inf")


def test_of_a_vit_it_is_what_small_changes_of_the_weights_say() -> None:
    def vit(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return timm.create_model("vit_tiny_patch16_224", **TINY)

    x = images(3)
    kernel = torch.zeros(3, 3, dtype=torch.float64)
    network, step = vit(5).double().eval(), 1e-5
    rng = torch.Generator().manual_seed(1)
    directions = 4000  # of random changes, whose products are the kernel on average
    weights = [p for p in network.parameters() if p.ndim > 1]
    with torch.no_grad():
        before = network(x.double()).sum(1)
        for _ in range(directions):
            changes = [torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in weights]
            for p, change in zip(weights, changes, strict=True):
                p += step * change
            moved = (network(x.double()).sum(1) - before) / step
            kernel += torch.outer(moved, moved) / directions
            for p, change in zip(weights, changes, strict=True):
                p -= step * change
    assert ntk_condition(vit, x, repeats=1, seed=5) == pytest.approx(condition(kernel), rel=0.2)
