"""How much a network that nobody has trained stretches a curve of inputs: a guess of what it can learn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
BATCH = 32
"""Points of the curve at a time."""


def length_distortion(
    make: Callable[[int], nn.Module], size: tuple[int, int], *, points: int = 64, repeats: int = 3, seed: int = 0
) -> float:
    """How many times longer than its circle of inputs the curve of its features is; the mean over `repeats`.

    Inputs go round a circle in a random plane, x(θ) = u cos θ + v sin θ with u and v of length 1 and orthogonal, in
    networks without norms, whose weights are drawn anew each time. With L = ∫ |∂f(x(θ))/∂θ| dθ it is L / 2π.

    make: a network with weights drawn by this seed, from images (B, 3, H, W) to features. size: (H, W).

    Source: Chen et al., Auto-scaling Vision Transformers without Training, 2022, arXiv 2202.11921, by its official
    code, which sums over the points in place of the integral, and takes derivatives feature by feature; here it is one
    derivative in the direction of the curve.
    """
    found = []
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(seed + repeat)
        plane = torch.linalg.qr(torch.randn(3 * math.prod(size), 2, generator=generator, dtype=torch.float64)).Q
        u, v = plane.T.reshape(2, 3, *size)
        network = without_norms(make(seed + repeat)).double().eval().requires_grad_(False)
        speeds = []
        for angles in (2 * math.pi * torch.arange(points, dtype=torch.float64) / points).split(BATCH):
            cos, sin = (f(angles)[:, None, None, None] for f in (torch.cos, torch.sin))
            speeds.append(_tangents(network, u * cos + v * sin, v * cos - u * sin).flatten(1).norm(dim=1))
        found.append(float(torch.cat(speeds).mean()))
    return sum(found) / repeats


def without_norms(network: nn.Module) -> nn.Module:
    """A copy whose norms are identities."""
    twin = copy.deepcopy(network)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, NORMS):
                setattr(module, name, nn.Identity())
    return twin


def _tangents(network: nn.Module, at: Tensor, along: Tensor) -> Tensor:
    """The derivative of the features along a direction, by forward differentiation, (B, …)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
        return torch.func.jvp(lambda x: network(x), (at,), (along,))[1]
