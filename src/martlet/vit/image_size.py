"""Another image size for a model that is there: position embeddings are resampled, as its library does."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from martlet.core.errors import SourceError
from martlet.vit.view import VitView, view

if TYPE_CHECKING:
    from martlet.core.model import Model


def set_image_size_(model: Model, size: tuple[int, int]) -> None:
    """Makes a model take images (H, W), in what it computes and in its preprocessing.

    timm's models do it themselves. Of Hugging Face's and torchvision's plain vision transformers the position
    embeddings of patches are resampled. Any other model has to run as it is.

    Raises:
        SourceError: it doesn't run at this size.
    """
    module = model.module
    try:
        vit = _plain(module)
        grid = None if vit is None else _grid(vit, size)
        if callable(resize := getattr(module, "set_input_size", None)):
            resize(img_size=size)
        elif vit is not None and grid is not None:
            _LIBRARIES[vit.library](vit, size, grid)
        with torch.inference_mode():
            logits = module(torch.zeros(1, 3, *size))
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SourceError(f"{model.name} can't take images of {size[0]} × {size[1]} pixels: {first}") from error
    assert logits.shape == (1, model.num_classes)
    if model.preprocess.size != size:
        model.preprocess = model.preprocess.override({"size": size})


def _plain(module: nn.Module) -> VitView | None:
    """The view of a vision transformer with one grid of patches."""
    try:
        vit = view(module)
    except SourceError:
        return None
    return vit if vit.family == "vit" and vit.tokens.grid is not None else None


def _hf(vit: VitView, size: tuple[int, int], grid: tuple[int, int]) -> None:
    root: Any = vit.root.module
    embeddings = getattr(root, root.base_model_prefix).embeddings
    patches = embeddings.patch_embeddings
    embeddings.position_embeddings = _resampled(embeddings.position_embeddings, vit, grid)
    embeddings.image_size = patches.image_size = size
    patches.num_patches = grid[0] * grid[1]


def _torchvision(vit: VitView, size: tuple[int, int], grid: tuple[int, int]) -> None:
    root: Any = vit.root.module
    if size[0] != size[1]:
        raise ValueError("torchvision's vision transformers take square images")
    root.encoder.pos_embedding = _resampled(root.encoder.pos_embedding, vit, grid)
    root.image_size = size[0]


_LIBRARIES = {"hf": _hf, "torchvision": _torchvision}


def _grid(vit: VitView, size: tuple[int, int]) -> tuple[int, int]:
    """Patches down and across in images of this size.

    Raises:
        ValueError: they don't fill the image.
    """
    h, w = math.prod(conv.stride[0] for conv in _convs(vit)), math.prod(conv.stride[1] for conv in _convs(vit))
    if size[0] % h or size[1] % w:
        raise ValueError(f"patches are {h} × {w} pixels, and don't fill such an image")
    return size[0] // h, size[1] // w


def _convs(vit: VitView) -> list[nn.Conv2d]:
    return [module for module in vit.patch_embed.module.modules() if isinstance(module, nn.Conv2d)]


def _resampled(positions: nn.Parameter, vit: VitView, grid: tuple[int, int]) -> nn.Parameter:
    """Position embeddings (1, N, C) for another grid; those of the tokens before the patches stay."""
    from timm.layers import resample_abs_pos_embed

    assert vit.tokens.grid is not None
    h, w = vit.tokens.grid
    resampled = resample_abs_pos_embed(
        positions.detach(), [*grid], old_size=[h, w], num_prefix_tokens=positions.shape[1] - h * w
    )
    return nn.Parameter(resampled, requires_grad=positions.requires_grad)
