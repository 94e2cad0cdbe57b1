"""Random weights under which every layer matters, to compare two forms of a model that has no trained ones."""

from __future__ import annotations

import torch
from torch import nn


def randomize_(module: nn.Module, seed: int = 0) -> None:
    """Matrices and kernels that keep the signal, noise on what starts as ones and zeros, statistics of batch norms.

    As libraries initialize them, layer scales and classifiers may be zero, and batch norms do nothing. Training mode in
    between empties caches of what follows from the weights.
    """
    training = module.training
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if name == "weight" and parameter.ndim > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
                else:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.normal_(0, 0.2, generator=generator)
                part.running_var.uniform_(0.5, 2, generator=generator)
    module.train().train(training)
