"""The tangent kernel's condition against kernels known in closed form, and against differences of a real network."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from martlet.measure.ntk_condition import ntk_condition

TINY: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 6, "num_heads": 2, "depth": 1, "num_classes": 0}


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


def vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = timm.create_model("vit_tiny_patch16_224", **TINY)
    network.norm = nn.Identity()
    return network


def test_of_a_vit_it_is_what_small_changes_of_each_weight_say() -> None:
    x, step = images(3, side=8), 1e-4
    network = vit(5).double().eval()
    gradients = []
    with torch.no_grad():
        for weight in (p for p in network.parameters() if p.ndim > 1):
            for i in range(weight.numel()):
                value = float(weight.view(-1)[i])
                sums = []
                for change in (step, -step):
                    weight.view(-1)[i] = value + change
                    sums.append(network(x.double()).sum(1))
                weight.view(-1)[i] = value
                gradients.append((sums[0] - sums[1]) / (2 * step))
    by_hand = torch.stack(gradients)
    assert ntk_condition(vit, x, repeats=1, seed=5) == pytest.approx(condition(by_hand.T @ by_hand), rel=1e-5)
    assert ntk_condition(vit, x, repeats=1, seed=6) != pytest.approx(condition(by_hand.T @ by_hand), rel=1e-2)
