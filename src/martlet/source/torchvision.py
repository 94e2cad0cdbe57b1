"""`torchvision:NAME`: the image classifiers of torchvision."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

import torchvision.models
from torch import nn
from torchvision.transforms import InterpolationMode

from martlet.core.errors import SourceError, nearest
from martlet.data.preprocess import Preprocess
from martlet.source import checkpoint
from martlet.source.base import PRETRAINED, Loaded, Request, first_line


def load(request: Request) -> Loaded:
    """Random weights, unless the request says otherwise; so is a head that torchvision starts at zero.

    Raises:
        SourceError: an unknown name or argument, no network for pretrained weights, or weights that don't fit.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if request.name not in known:
        raise SourceError(f"torchvision has no classifier {request.name!r}{nearest(request.name, known)}")
    default = torchvision.models.get_model_weights(request.name).DEFAULT  # type: ignore[attr-defined]
    pretrained = default if request.weights == PRETRAINED else None
    module = _create(request.name, request.num_classes, request.kwargs, pretrained)
    weights = request.random_weights if pretrained is None else f"torchvision {default}"
    if file := request.weights_file:
        weights = checkpoint.load_(module, file)
    elif pretrained is None:
        _draw_zero_heads_(module)
    transforms = default.transforms()
    interpolation: InterpolationMode = transforms.interpolation
    preprocess = Preprocess(
        size=(transforms.crop_size[0], transforms.crop_size[0]),
        resize=transforms.resize_size[0],
        interpolation=interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
    if size := request.kwargs.get("image_size"):
        preprocess = preprocess.override({"size": size})
    return Loaded(
        module=module,
        preprocess=preprocess,
        origin={"name": request.name, "kwargs": dict(request.kwargs), "num_classes": request.num_classes},
        weights=weights,
        class_names=tuple(default.meta["categories"]) if request.num_classes is None else None,
    )


def rebuild(origin: Mapping[str, Any]) -> nn.Module:
    """The architecture with random weights."""
    return _create(origin["name"], origin["num_classes"], origin["kwargs"], None)


def _draw_zero_heads_(module: nn.Module) -> None:
    """Gives Linears that are all zero random weights: with its head at zero every answer of a ViT is the same."""
    for part in module.modules():
        if isinstance(part, nn.Linear) and not part.weight.any():
            nn.init.trunc_normal_(part.weight, std=0.02)


def _create(name: str, num_classes: int | None, kwargs: Mapping[str, Any], weights: Any) -> nn.Module:
    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where torch says what it downloads
            return torchvision.models.get_model(name, weights=weights, **classes, **kwargs)
    except Exception as error:
        what = f"get the pretrained weights of {name}" if weights is not None else f"make {name} with {dict(kwargs)}"
        raise SourceError(f"torchvision can't {what}: {first_line(error)}") from error
