"""Fits layers of a smaller copy of a network, one after the other, to what the whole one's give, by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from martlet.core.technique import Batches, Progress, silent
from martlet.functional.structure.repair import Gram, fit

RIDGE = 1e-3
"""Relative to the mean square of an input: how strongly weights are held to what they were."""
MOST_INPUTS = 2304
"""Of a layer that is fitted: more take too long to solve for."""
PLACES = 64
"""Of each image, at most, in which a convolution is looked at: what neighbors give is alike."""


@torch.no_grad()
def refit_(
    small: nn.Module,
    whole: nn.Module,
    kept: Mapping[str, Sequence[int]],
    names: Sequence[str],
    images: Batches,
    *,
    progress: Progress = silent,
) -> None:
    """Fits the layers of these names, in order, so that each repairs what those before it have lost.

    kept: by name, which outputs of the whole network's layer the small one's has; all, where it isn't named. Layers in
    groups, such as depthwise convolutions, and those with too many inputs stay as they are.
    """
    for number, name in enumerate(names):
        progress("refitting layers", number, len(names))
        layer = small.get_submodule(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
            continue
        if cast(Tensor, layer.weight)[0].numel() > MOST_INPUTS:
            continue
        prior = cast(Tensor, layer.weight).flatten(1)
        gram = Gram(prior.shape[1], prior.shape[0])
        rows = kept.get(name)
        for batch in images:
            x, _ = _seen(small, layer, batch)
            _, y = _seen(whole, whole.get_submodule(name), batch)
            samples, targets = _samples(layer, x, y)
            gram.add_(samples, targets if rows is None else targets[:, list(rows)])
        found = fit(gram, torch.arange(prior.shape[1]), prior, RIDGE, bias=layer.bias is not None)
        layer.weight.copy_(found.weight.reshape(layer.weight.shape))
        if layer.bias is not None and found.bias is not None:
            layer.bias.copy_(found.bias)


def _seen(module: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a layer, and what it gives."""
    found: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        found.append((args[0], out))

    handle = layer.register_forward_hook(hook)
    try:
        module(images)
    finally:
        handle.remove()
    return found[0]


def _samples(layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (S, I) and outputs (S, O) of the same places."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2), y.flatten(0, -2)
    columns = functional.unfold(
        x,
        cast(tuple[int, int], layer.kernel_size),
        cast(tuple[int, int], layer.dilation),
        cast(tuple[int, int], layer.padding),
        cast(tuple[int, int], layer.stride),
    )  # (B, I, P)
    step = max(1, columns.shape[-1] // PLACES)
    return columns[..., ::step].transpose(1, 2).flatten(0, 1), y.flatten(2)[..., ::step].transpose(1, 2).flatten(0, 1)
