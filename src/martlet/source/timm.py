"""`timm:NAME` or `timm:NAME.tag`: every image classifier of timm."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import timm
import timm.data
from torch import Tensor, nn

from martlet.core.errors import SourceError, nearest
from martlet.data.preprocess import Preprocess
from martlet.source import checkpoint
from martlet.source.base import PRETRAINED, Loaded, Request, first_line

FITS = {"center": "cover", "squash": "squash", "border": "contain"}
"""timm's crop modes as Preprocess.fit."""


def load(request: Request) -> Loaded:
    """Random weights, unless the request says otherwise.

    Raises:
        SourceError: an unknown name or argument, no network for pretrained weights, or weights that don't fit.
    """
    pretrained = request.weights == PRETRAINED
    module = _create(request.name, request.num_classes, request.kwargs, pretrained)
    if not getattr(module, "num_classes", 1):
        raise SourceError(f"timm:{request.name} has no classifier; give it one with --num-classes")
    weights = f"timm {request.name}" if pretrained else request.random_weights
    if file := request.weights_file:
        weights = checkpoint.load_(module, file, _convert)
    return Loaded(
        module=module,
        preprocess=preprocess(timm.data.resolve_model_data_config(module), request.kwargs.get("img_size")),
        origin={"name": request.name, "kwargs": dict(request.kwargs), "num_classes": request.num_classes},
        weights=weights,
        class_names=_class_names(module) if request.num_classes is None else None,
    )


def rebuild(origin: Mapping[str, Any]) -> nn.Module:
    """The architecture with random weights."""
    return _create(origin["name"], origin["num_classes"], origin["kwargs"], pretrained=False)


def preprocess(config: Mapping[str, Any], img_size: int | tuple[int, int] | None = None) -> Preprocess:
    """timm's data config as what `timm.data.create_transform(**config)` does with it.

    img_size: (H, W) or a side, in place of the config's.

    Raises:
        SourceError: a crop mode that isn't center, squash or border.
    """
    side = config["input_size"][-2:] if img_size is None else img_size
    h, w = (side, side) if isinstance(side, int) else side
    crop_pct, mode = config["crop_pct"], config["crop_mode"]
    if mode not in FITS:
        raise SourceError(f"timm's crop mode {mode!r} isn't known; set size and resize of the preprocessing")
    box = (math.floor(h / crop_pct), math.floor(w / crop_pct))
    resize = {"resize": box, "fit": FITS[mode]}
    if mode == "center" and box[0] == box[1]:
        resize = {"resize": box[0]}
    return Preprocess(
        size=(h, w),
        **resize,
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _create(name: str, num_classes: int | None, kwargs: Mapping[str, Any], pretrained: bool) -> nn.Module:
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise SourceError(f"timm has no model {base!r}{nearest(base, timm.list_models())}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise SourceError(f"timm has no weights {tag!r} of {base} (known: {', '.join(tags) or 'none'})")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        return timm.create_model(name, pretrained=pretrained, **classes, **kwargs)
    except Exception as error:
        if pretrained:
            raise SourceError(f"timm can't get the pretrained weights of {name}: {first_line(error)}") from error
        raise SourceError(f"timm can't make {name} with {dict(kwargs)}: {first_line(error)}") from error


def _convert(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The renaming that timm brings for a family's older checkpoints, and its resampling of position embeddings."""
    convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    return state if convert is None else convert(state, module)


def _class_names(module: nn.Module) -> tuple[str, ...] | None:
    subset = timm.data.infer_imagenet_subset(module)
    return tuple(timm.data.ImageNetInfo(subset).label_descriptions()) if subset else None
