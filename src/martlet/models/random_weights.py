"""Random weights under which every layer matters, to compare two forms of a model that has no trained ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NOISE = 0.2
LEAST_VARIANCE = 1e-4


def randomize_(module: nn.Module, seed: int = 0, images: Tensor | None = None) -> None:
    """Matrices and kernels that keep the signal, noise on the rest, statistics of batch norms.

    The coefficients of a function are changed by a part of themselves: others would make another function, and may
    make one in whose results rounding grows.

    As libraries initialize them, layer scales and classifiers may be zero, and batch norms do nothing. Training mode in
    between empties caches of what follows from the weights.

    images: (B, 3, H, W), of which each batch norm gets its statistics, changed by noise. Without, statistics are those
    of inputs around 0 and 1: through dozens of such layers the signal dies, and logits no longer depend on the image,
    or it grows, and they are made of rounding. What differs less than it is large, such as an average over all patches,
    is divided by how large it is: by how it differs, its rounding would grow with it.
    """
    training = module.training
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if name == "weight" and parameter.ndim > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
                elif parameter.ndim == 1 and (parameter != parameter[0]).any():
                    parameter *= 1 + NOISE * torch.randn(parameter.shape, generator=generator)
                else:
                    parameter += NOISE * torch.randn(parameter.shape, generator=generator)
            if isinstance(part, _BatchNorm):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.normal_(0, NOISE, generator=generator)
                part.running_var.uniform_(0.5, 2, generator=generator)
    if images is not None:
        _settle_(module.eval(), images, generator)
    module.train().train(training)


@torch.no_grad()
def _settle_(module: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Gives batch norms, in the order in which they run, about the statistics of what comes to them."""

    def settle(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(part, _BatchNorm) and part.running_mean is not None and part.running_var is not None
        (x,) = inputs
        mean, variance = (f(x, [d for d in range(x.ndim) if d != 1]) for f in (torch.mean, torch.var))
        deviation = variance.maximum(mean**2).clamp(min=LEAST_VARIANCE).sqrt()
        part.running_mean.copy_(mean + NOISE * deviation * torch.randn(mean.shape, generator=generator))
        part.running_var.copy_(deviation**2 * torch.empty_like(mean).uniform_(0.5, 2, generator=generator))

    handles = [part.register_forward_pre_hook(settle) for part in module.modules() if isinstance(part, _BatchNorm)]
    module(images)
    for handle in handles:
        handle.remove()
