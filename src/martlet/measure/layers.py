"""Error of each layer against the untouched model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from martlet.core.model import Model
from martlet.core.report import Layer
from martlet.core.technique import Progress, Stage, silent
from martlet.data.calibration import resize

if TYPE_CHECKING:
    from martlet.graph.sites import Site


CHANNELS = {"linear": (-1,), "conv": (1,), "scores": (-3,), "values": (-3, -1), "product": ()}
"""Axes of channels in the output of a multiplication: (…, O), (B, O, H, W), (B, H, N, N), (B, H, N, D)."""


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """10 log10(|reference|² / |reference - test|²), in dB; infinite where they are equal."""
    error = float((reference.double() - test.double()).square().sum())
    signal = float(reference.double().square().sum())
    return math.inf if error == 0 else 10 * math.log10(signal / error) if signal > 0 else -math.inf


def align(reference: Tensor, test: Tensor, channels: tuple[int, ...]) -> Tensor:
    """test times a scale plus an offset, for each channel the ones with the least squared error.

    channels: the axes of channels in both, which have one shape. Equal tensors stay as they are.
    """
    if torch.equal(reference, test):
        return test
    kept = {axis % reference.ndim for axis in channels} - {0}  # of one head, (B, N, N), the images come first
    others = [axis for axis in range(reference.ndim) if axis not in kept]
    a, b = reference.double(), test.double()
    mean_a, mean_b = a.mean(others, keepdim=True), b.mean(others, keepdim=True)
    spread = (b - mean_b).square().sum(others, keepdim=True)
    slope = ((a - mean_a) * (b - mean_b)).sum(others, keepdim=True) / torch.where(spread > 0, spread, 1.0)
    return (b - mean_b) * slope + mean_a


def layer_errors(baseline: Model, compressed: Model, images: Tensor, progress: Progress = silent) -> list[Layer]:
    """SQNR of the output of every multiplication that both models have, each fed by its own predecessors.

    It is what the best scale and offset of each channel leave, because exact rewrites move these into other layers.
    images: float32 (B, 3, H, W), resized where a model wants it. Runs both in torch. Layers that only one of the two
    has, or that are equal in both, are left out.
    """
    outputs = []
    for i, model in enumerate((baseline, compressed)):
        progress("compare layers", i, 2)
        outputs.append(_outputs(model, resize(images, model.preprocess.size)))
    reference, test = outputs
    layers = []
    for name, (site, value) in reference.items():
        other, its = test.get(name, (site, value[:0]))
        if (other.kind, its.shape[-1], its.numel()) == (site.kind, value.shape[-1], value.numel()):
            its = its.reshape(value.shape)  # a Linear's (B N, O) as (B, N, O)
            error = sqnr_db(value, align(value, its, CHANNELS[site.kind]))
            if math.isfinite(error):
                layers.append(Layer(name=name, kind=site.kind, sqnr_db=round(error, 2)))
    return layers


def _outputs(model: Model, images: Tensor) -> dict[str, tuple[Site, Tensor]]:
    from martlet.graph.sites import sites
    from martlet.graph.trace import trace

    module = trace(model.module, model.preprocess.size) if model.stage is Stage.MODULE else model.module
    assert isinstance(module, GraphModule)
    found = {site.node: site for site in sites(module)}
    kept: dict[str, tuple[Site, Tensor]] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: Node) -> object:
            value = super().run_node(n)
            if n in found and isinstance(value, Tensor):
                kept[found[n].name] = (found[n], value)
            return value

    with torch.no_grad():
        Keep(module).run(images)
    return kept
