"""`martlet:NAME`: our own zoo, with the weights that come in the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from martlet import models
from martlet.source import checkpoint
from martlet.source.base import PRETRAINED, RANDOM, Loaded, Request


def load(request: Request) -> Loaded:
    """The trained weights of the package if there are any, unless the request says otherwise.

    Raises:
        SourceError: an unknown name or argument, or weights that don't fit.
    """
    module = _create(request.name, request.num_classes, request.kwargs)
    shipped = models.weights(request.name)
    file = request.weights_file or (shipped if request.weights != RANDOM else None)
    if file is None and request.weights == PRETRAINED:
        models.create(request.name, pretrained=True)  # raises: there are none
    return Loaded(
        module=module,
        preprocess=models.preprocess(request.name, request.kwargs.get("img_size")),
        origin={"name": request.name, "kwargs": dict(request.kwargs), "num_classes": request.num_classes},
        weights=request.random_weights if file is None else checkpoint.load_(module, file),
        class_names=models.class_names(request.name) if request.num_classes is None else None,
    )


def rebuild(origin: Mapping[str, Any]) -> nn.Module:
    """The architecture with random weights."""
    return _create(origin["name"], origin["num_classes"], origin["kwargs"])


def _create(name: str, num_classes: int | None, kwargs: Mapping[str, Any]) -> nn.Module:
    return models.create(name, **({} if num_classes is None else {"num_classes": num_classes}), **kwargs)
