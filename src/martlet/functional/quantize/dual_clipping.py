"""A grid for each channel of a LayerNorm's output whose two ends are learned: how much of a channel is worth clipping.

Source: Li et al., RepQuant, 2024, arXiv 2402.05628 (learnable per-channel dual clipping). A few tokens stretch a
channel's range; each end is moved for itself, because channels are unbalanced. Differs: of the paper its abstract was
at hand, so what follows is ours: an end is a share of the range seen, a sigmoid's, and what is kept small is the output
error of the linear layers that read the channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from martlet.functional.quantize.logarithmic import check_bits

STEPS = 100
RATE = 0.05
"""Of Adam, on the sigmoids' inputs."""
INSIDE = 0.02
"""How near to the end of its range a clipping starts at the least, as a share of it: there a sigmoid has a gradient."""


def rounded_channels(
    rows: Float[Tensor, "r c"], low: Float[Tensor, " c"], high: Float[Tensor, " c"], bits: int
) -> Float[Tensor, "r c"]:
    """Each channel rounded to evenly spaced values from about low to high, of which zero or its continuation is one.

    (clip(⌊x / s⌉ + z, 0, 2^bits - 1) - z) s with s = (high - low) / (2^bits - 1) and z = ⌊-low / s⌉. Rounding passes
    gradients as if it weren't there, so that within the range x has one, and beyond it the end it is clipped to.
    """
    last = 2**bits - 1
    scale = (high - low) / last
    zero = _round(-low / scale)
    return ((_round(rows / scale) + zero).clamp(0, last) - zero) * scale


def learn_clipping(
    rows: Float[Tensor, "r c"],
    weight: Float[Tensor, "o c"],
    bits: int,
    start: tuple[Float[Tensor, " c"], Float[Tensor, " c"]],
    steps: int = STEPS,
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """A scale and a whole zero point for each channel, of those seen while learning with the least output error.

    start: scales and zero points, as `percentile_scales` gives them; the result is never worse on these rows. A channel
    of one value keeps its start.

    Raises:
        ValueError: bits not from 2 to 8, or not as many channels in rows, weight and start.
    """
    check_bits(bits)
    scale, zero = start
    if not rows.shape[1] == weight.shape[1] == len(scale) == len(zero):
        raise ValueError(f"rows {tuple(rows.shape)}, weight {tuple(weight.shape)}, {len(scale)} scales")
    last = 2**bits - 1
    least, most = rows.amin(0), rows.amax(0)
    span = most - least
    moving = span > 0
    usable = torch.where(moving, span, 1.0)
    cuts = [(-zero * scale - least) / usable, (most - (last - zero) * scale) / usable]  # shares of the range, (c)
    gram = weight.T @ weight  # |D Wᵀ|² = Σ D G ∘ D
    power = float(((rows @ gram) * rows).sum()) or 1.0

    def ends(raw: list[Tensor]) -> tuple[Tensor, Tensor]:
        low, high = (torch.sigmoid(r) / 2 for r in raw)  # at most half of the range from either side
        return least + usable * low, most - usable * high

    def error(low: Tensor, high: Tensor) -> Tensor:
        difference = torch.where(moving, rounded_channels(rows, low, high, bits) - rows, 0.0)
        return ((difference @ gram) * difference).sum() / power

    with torch.enable_grad():
        raw = [torch.logit((2 * cut).clamp(INSIDE, 1 - INSIDE)).requires_grad_() for cut in cuts]
        optimizer = torch.optim.Adam(raw, RATE)
        best, least_error = (-zero * scale, (last - zero) * scale), float("inf")
        with torch.no_grad():
            least_error = float(error(*best))
        for _ in range(steps):
            low, high = ends(raw)
            loss = error(low, high)
            if float(loss.detach()) < least_error:
                best, least_error = (low.detach(), high.detach()), float(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    low, high = best
    learned = (high - low) / last
    return torch.where(moving, learned, scale), torch.where(moving, torch.round(-low / learned), zero)


def _round(x: Tensor) -> Tensor:
    """Rounded, with a gradient as if it weren't."""
    return x + (torch.round(x) - x).detach()
