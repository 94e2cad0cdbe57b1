"""How unevenly a network that nobody has trained would learn from images: a guess of how well it trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def ntk_condition(make: Callable[[int], nn.Module], images: Tensor, *, repeats: int = 3, seed: int = 0) -> float:
    """The condition number of the neural tangent kernel; its mean over networks with weights drawn anew each time.

    Θ(x, y) = ∂f(x)/∂w · ∂f(y)/∂w over all weights w of more than one dimension, where f is the sum of the features;
    the largest eigenvalue of Θ over the smallest. Small is good: what tells images apart is learned evenly.

    make: a network with weights drawn by this seed, from images (B, 3, H, W) to features. They come from before a last
    norm, after which their sum is constant. images: (B, 3, H, W).

    Returns infinity where two images can't be told apart.

    Source: Chen et al., Auto-scaling Vision Transformers without Training, 2022, arXiv 2202.11921, by its official
    code, which takes norms as in training and parameters by the word `weight` in their names; those of norms, which
    have one dimension, are left out here.
    """
    found = []
    for repeat in range(repeats):
        network = make(seed + repeat).double().eval()
        found.append(_condition(_gradients(network, images.double())))
    return sum(found) / repeats


def _gradients(network: nn.Module, images: Tensor) -> Tensor:
    """Of the sum of each image's features by the weights, (B, W)."""
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    rows = []
    for image in images.split(1):
        gradients = torch.autograd.grad(network(image).sum(), weights, allow_unused=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]))
    return torch.stack(rows)


def _condition(gradients: Tensor) -> float:
    eigenvalues = torch.linalg.eigvalsh(gradients @ gradients.mT)  # ascending
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    return largest / smallest if smallest > torch.finfo(eigenvalues.dtype).eps * largest else float("inf")
