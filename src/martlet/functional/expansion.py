"""Numbers of very different sizes in 8 floating bits: a power brings a group's range to that of the format.

Source: Xi et al., COAT, 2025, arXiv 2410.19313, dynamic range expansion, as the official code has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

GREATEST = 448.0
"""Of E4M3."""
RANGE = GREATEST**2 / 2
"""The ratio of E4M3's greatest number to its least that is normal enough, of the official code."""
FINEST = 16
"""Powers are multiples of one over this."""
MOST = 8.0
"""The highest power."""


@dataclass(frozen=True)
class Expanded:
    """Groups of numbers: codes (G, n) in E4M3; and by group scale, power and the geometric mean of its range (G,).

    A number is sign(c) |c scale|^(1 / power) center.
    """

    codes: Float[Tensor, "g n"]
    scale: Float[Tensor, " g"]
    power: Float[Tensor, " g"]
    center: Float[Tensor, " g"]


def expand(x: Float[Tensor, "g n"], expands: bool = True) -> Expanded:
    """Rounds groups to E4M3 after sign(x) |x / c|^k, of which the greatest becomes 448.

    k = log(RANGE) / log(greatest / least), rounded down; least is that of a group's magnitudes but 0, c = √(greatest
    least). Without `expands`, k = c = 1: plain scaling. A group of zeros stays so.
    """
    size = x.abs()
    greatest = size.amax(-1)
    greatest = torch.where(greatest > 0, greatest, 1.0)
    power, center = torch.ones_like(greatest), torch.ones_like(greatest)
    if expands:
        least = torch.where(size > 0, size, greatest[:, None]).amin(-1)
        center = greatest.sqrt() * least.sqrt()
        ratio = torch.log(greatest / least).clamp(min=1e-6)
        power = ((torch.log(torch.tensor(RANGE)) / ratio * FINEST).floor() / FINEST).clamp(1 / FINEST, MOST)
    scale = (greatest / center).pow(power) / GREATEST
    codes = x.sign() * (size / center[:, None]).pow(power[:, None]) / scale[:, None]
    return Expanded(codes.clamp(-GREATEST, GREATEST).to(torch.float8_e4m3fn), scale, power, center)


def contract(x: Expanded) -> Float[Tensor, "g n"]:
    """The numbers again, as far as 8 bits hold them."""
    codes = x.codes.float() * x.scale[:, None]
    return codes.sign() * codes.abs().pow(1 / x.power[:, None]) * x.center[:, None]
