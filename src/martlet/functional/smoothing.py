"""Moving the difficulty of quantization from activations to weights."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def smoothquant_factors(
    activation_amax: Float[Tensor, " c"], weight_amax: Float[Tensor, " c"], alpha: float
) -> Float[Tensor, " c"]:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), with which X is divided and W multiplied.

    Source: Xiao et al., SmoothQuant, 2023, arXiv 2211.10438, equation 4. Channels that are never active keep s = 1,
    and all are divided by their geometric mean, which the paper leaves free: only ratios between channels matter for
    a per-tensor range.
    """
    dead = (activation_amax <= 0) | (weight_amax <= 0)
    factors = activation_amax.clamp(min=1e-8) ** alpha / weight_amax.clamp(min=1e-8) ** (1 - alpha)
    live = factors[~dead]
    if live.numel():
        factors = factors / live.log().mean().exp()
    factors[dead] = 1.0
    return factors
