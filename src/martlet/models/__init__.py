"""The zoo: architectures that Martlet brings itself, one file a family.

A family is written as timm writes one: `default_cfgs` says how a model wants its images and where its weights lie, and
`@register_model` makes the function of each model known. So `timm.create_model(name)` works once this package is
imported, and a new family is one new file here, listed nowhere else. `PAPER` beside them is what its paper states.
`papers.timm` has the same of architectures that timm brings itself: together they are the table to choose from.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg, model_entrypoint
from torch import nn

from martlet.core.errors import SourceError, nearest
from martlet.data.preprocess import Preprocess
from martlet.models.papers.paper import Paper, Stated
from martlet.models.papers.timm import PAPERS
from martlet.source.timm import preprocess as timm_preprocess

__all__ = [
    "class_names",
    "create",
    "image_size",
    "names",
    "origin_of_weights",
    "paper",
    "preprocess",
    "skeleton",
    "spec",
    "stated",
    "timm_names",
    "weights",
]

for _family in iter_modules(__path__, f"{__name__}."):
    import_module(_family.name)


@cache
def names() -> tuple[str, ...]:
    """Every model of the zoo, sorted."""
    ours = (name for name in timm.list_models() if model_entrypoint(name).__module__.startswith(f"{__name__}."))
    return tuple(sorted(ours))


def create(name: str, *, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A model that maps images (B, 3, H, W) to logits (B, K), its weights random unless `pretrained`.

    kwargs: what the model's own constructor takes (`num_classes`, `img_size` …).

    Raises:
        SourceError: no such model, it has no trained weights, or its constructor refuses the arguments.
    """
    cfg = _cfg(name)
    if pretrained and cfg.file is None:
        raise SourceError(f"{name} comes without trained weights; give your own with --weights")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise SourceError(f"{name} can't be made with {kwargs}: {error}") from error


def preprocess(name: str, img_size: int | tuple[int, int] | None = None) -> Preprocess:
    """How the model wants its images; if it was made with an `img_size`, of that.

    Raises:
        SourceError: no such model.
    """
    return timm_preprocess(asdict(_cfg(name)), img_size)


def weights(name: str) -> Path | None:
    """The safetensors file of the trained weights, in float16; None if the model has none.

    Raises:
        SourceError: no such model.
    """
    file = _cfg(name).file
    return None if file is None else Path(file)


def origin_of_weights(name: str) -> str:
    """`trained`: they come with Martlet. `timm`: timm has some to download. `random`: there are none.

    Raises:
        SourceError: no such model.
    """
    if name not in _timm_papers():
        return "trained" if weights(name) else "random"
    cfg = get_pretrained_cfg(name)
    return "timm" if cfg is not None and cfg.has_weights else "random"


def class_names(name: str) -> tuple[str, ...] | None:
    """What the trained classes are called, in the order of the logits; None if that isn't known.

    Raises:
        SourceError: no such model.
    """
    return _cfg(name).label_names


def timm_names() -> tuple[str, ...]:
    """Architectures of the installed timm whose papers' figures are kept here, family by family."""
    return tuple(name for name in _timm_papers() if timm.is_model(name))


def spec(name: str) -> str:
    """What one types for a model of `names` or `timm_names`: `martlet:cswin_tiny`, `timm:repvit_m1_0`."""
    return f"{'timm' if name in _timm_papers() else 'martlet'}:{name}"


def paper(name: str) -> Paper | None:
    """What the paper of the model's family states; None of a model that is our own.

    name: of `names` or of `timm_names`.

    Raises:
        SourceError: no such model.
    """
    if name in _timm_papers():
        return _timm_papers()[name]
    _cfg(name)
    return getattr(sys.modules[model_entrypoint(name).__module__], "PAPER", None)


def stated(name: str) -> Stated | None:
    """The model's own row of `paper`.

    Raises:
        SourceError: no such model.
    """
    found = paper(name)
    return found.models[name] if found else None


def image_size(name: str) -> tuple[int, int]:
    """(H, W) of the images that the model's figures are of: those of its paper.

    Raises:
        SourceError: no such model.
    """
    row = stated(name)
    if row and row.image_size:
        return row.image_size, row.image_size
    if name not in _timm_papers():
        return preprocess(name).size
    cfg = get_pretrained_cfg(name)
    assert cfg is not None
    return cfg.input_size[1], cfg.input_size[2]


def skeleton(name: str) -> nn.Module:
    """The model without values (on the meta device), in inference mode, in the form that its paper counts.

    Raises:
        SourceError: no such model.
    """
    from martlet.techniques.fuse.fuse import reparameterize_

    row = stated(name)
    with torch.device("meta"):
        module = timm.create_model(name, num_classes=1000) if name in _timm_papers() else timm.create_model(name)
        module.eval()
        if row and row.fused:
            reparameterize_(module)
    return module


@cache
def _timm_papers() -> dict[str, Paper]:
    return {name: paper for paper in PAPERS for name in paper.models}


def _cfg(name: str) -> PretrainedCfg:
    if name not in names():
        raise SourceError(f"the zoo has no model {name!r}{nearest(name, names())} (known: {', '.join(names())})")
    cfg = get_pretrained_cfg(name)
    if cfg is None:
        raise TypeError(f"{name} has no entry in its family's default_cfgs")  # a defect of the package
    return cfg
