"""What a block learns to keep small: its error, or its error weighted by what it does to the logits.

The weights come from KL(softmax(z / T), softmax(z' / T)), of logits z' against the float model's z, as a function of
the block's output. The last block's loss is that divergence itself, with T = 1, in both methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

TEMPERATURE = 20.0
"""T in both official codes."""
RANK = 5
"""Of FIMA-Q's low-rank part: its official configuration."""
PART = 4
"""Images that go through what follows a block at once, with gradients."""


@dataclass(frozen=True)
class Block:
    """What an objective may use. Images come first in all tensors.

    rest: what follows the block in the float model, up to the logits; None for the last. output: the float block's.
    now: gives what the block gives at the moment, for all images. steps: how often the loss will be asked for.
    """

    rest: GraphModule | None
    output: Tensor
    now: Callable[[], Tensor]
    steps: int


Loss = Callable[[Tensor, Tensor], Tensor]
"""From a block's error (b, …) and the numbers (b,) of the images it is of to one number."""


def mean_squared(block: Block) -> Loss:
    """The mean squared error."""
    return lambda error, images: error.square().mean()


def perturbation_hessian(block: Block) -> Loss:
    """The mean of error² |H 1|, with the divergence's Hessian H, |H 1| averaged over images.

    Source: Wu et al., APHQ-ViT, 2025, arXiv 2504.02508 (average perturbation Hessian). Differs: the official code takes
    the difference of two gradients at outputs 2e-6 apart; here H 1 is differentiated exactly.
    """
    if block.rest is None:
        return _divergence(block)
    total = torch.zeros_like(block.output[0])
    for part in block.output.split(PART):
        output = part.clone().requires_grad_()
        with torch.enable_grad():
            logits = block.rest(output)
            divergence = _kl(logits.detach(), logits, TEMPERATURE)
            [gradient] = torch.autograd.grad(divergence, output, create_graph=True)
            [product] = torch.autograd.grad(gradient.sum(), output)
        total += product.abs().sum(0)
    importance = total / total.mean()
    return lambda error, images: (error.square() * importance).mean()


def diagonal_plus_low_rank(block: Block) -> Loss:
    """FIMA-Q: the error in a diagonal plus low-rank Fisher information matrix, built from gradients while learning.

    Every `steps` / RANK steps the divergence's gradient g at the rounded output and the error d there, both as absolute
    values and averaged over images, add a row to G and D. For an error e the loss is a (D Dᵀ)⁻¹ aᵀ with a = |e| Gᵀ, and
    the mean of e² times G's mean row, each relative to its value when a row was added last.

    Source: Wu et al., FIMA-Q, 2025, arXiv 2506.11543, its official code with its configuration for 4 bits.
    """
    if block.rest is None:
        return _divergence(block)
    rest = block.rest
    with torch.no_grad():
        logits = torch.cat([rest(part) for part in block.output.split(PART)])
    rows, errors = list[Tensor](), list[Tensor]()
    every, calls, first = -(-block.steps // RANK), 0, list[Tensor]()

    def loss(error: Tensor, images: Tensor) -> Tensor:
        nonlocal calls
        if calls % every == 0:
            output = block.now()
            rows.append(_mean_gradient(rest, output, logits).flatten())
            errors.append((output - block.output).abs().mean(0).flatten())
            first.clear()
        calls += 1
        g, d = torch.stack(rows), torch.stack(errors)  # (k, N)
        distance = error.abs().flatten(1)  # (b, N)
        a = distance @ g.T  # (b, k)
        low_rank = (a @ torch.linalg.pinv(d @ d.T) * a).sum(1).mean()
        diagonal = (distance.square() * g.mean(0)).mean()
        if not first:
            first.extend(part.detach().clamp(min=torch.finfo(part.dtype).tiny) for part in (low_rank, diagonal))
        return low_rank / first[0] + diagonal / first[1]

    return loss


OBJECTIVES: dict[str, Callable[[Block], Loss]] = {
    "mse": mean_squared,
    "perturbation": perturbation_hessian,
    "fisher": diagonal_plus_low_rank,
}


def _mean_gradient(rest: GraphModule, output: Tensor, logits: Tensor) -> Tensor:
    """|g| of the divergence from `logits` (B, K) at a block's output (B, …), averaged over images."""
    total = torch.zeros_like(output[0])
    for part, target in zip(output.split(PART), logits.split(PART), strict=True):
        x = part.clone().requires_grad_()
        with torch.enable_grad():
            [gradient] = torch.autograd.grad(_kl(target, rest(x), TEMPERATURE), x)
        total += gradient.abs().sum(0)
    return total / len(output)


def _divergence(block: Block) -> Loss:
    return lambda error, images: _kl(block.output[images], block.output[images] + error, 1.0) / len(images)


def _kl(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """KL(softmax(target / T), softmax(logits / T)) of rows (B, K), added up."""
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (target, logits))
    return (log_p.exp() * (log_p - log_q)).sum()
