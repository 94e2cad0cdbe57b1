"""Exits: where an image may leave a model, and the heads that say with which logits and how surely."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

NEVER, ALWAYS = (-math.inf, math.inf), (math.inf, math.inf)
"""Windows of confidence in which every image goes on, and in which none does."""

# An operation of our own: it marks where a graph may be cut, and gives each side of it its gradient.
_library = torch.library.Library("martlet", "FRAGMENT")
_library.define("leave(Tensor logits, Tensor confidence, Tensor later, Tensor window) -> Tensor")


def goes_on(confidence: Tensor, window: Tensor) -> Tensor:
    """Which images (B,) stay for what is later: those whose confidence (B,) is in [low, high), `window` (2,)."""
    return (window[0] <= confidence) & (confidence < window[1])


def _leave(logits: Tensor, confidence: Tensor, later: Tensor, window: Tensor) -> Tensor:
    return torch.where(goes_on(confidence, window)[:, None], later, logits)


_library.impl("leave", _leave, "CompositeExplicitAutograd")


@torch.library.register_fake("martlet::leave")
def _(logits: Tensor, confidence: Tensor, later: Tensor, window: Tensor) -> Tensor:
    return torch.empty_like(later)


# Whichever side an image took, both learn from it: so what is asked of the logits is asked of every exit.
torch.library.register_autograd("martlet::leave", lambda _, gradient: (gradient, None, gradient, None))
LEAVE = torch.ops.martlet.leave.default


def leave(logits: Tensor, confidence: Tensor, later: Tensor, window: Tensor) -> Tensor:
    """What images (B, K) leave with: `logits` where the confidence (B,) is outside the window, else `later` (B, K).

    window: low and high (2,); with NEVER the result is `later`, bit for bit. The gradient goes to both.
    """
    return LEAVE(logits, confidence, later, window)


def top_probability(logits: Tensor) -> Tensor:
    """The largest probability (B,) of a softmax over logits (B, K)."""
    return (logits - logits.amax(1, keepdim=True)).exp().sum(1).reciprocal()


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """The cosine (B,) of two tensors (B, …), each as one long vector."""
    first, second = first.flatten(1), second.flatten(1)
    norms = (first.square().sum(1) * second.square().sum(1)).sqrt()
    return (first * second).sum(1) / norms.clamp_min(1e-12)


class Exit(nn.Module):
    """An exit: a head, and the window of confidence in which images go on past it.

    head: from tokens to logits (B, K).
    """

    window: Tensor

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("window", torch.tensor(NEVER))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(tokens)


def has_exits(module: nn.Module) -> bool:
    """Whether a model, traced or not, can stop early."""
    if isinstance(module, GraphModule):
        return bool(module.graph.find_nodes(op="call_function", target=LEAVE))
    return any(isinstance(part, Exit) for part in module.modules())
