"""`hf:FOLDER_OR_ID`: image classifiers of transformers, from a saved folder or the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging

from martlet.core.errors import SourceError, nearest
from martlet.data.preprocess import Preprocess
from martlet.source import checkpoint
from martlet.source.base import RANDOM, Loaded, Request, first_line

TOLERANCE = 4 / 255
"""Between transformers' resampling of tensors and PIL's, on a smooth image, of values in [0, 1]."""


class ImageClassifier(nn.Module):
    """A transformers classifier that takes images (B, 3, H, W) and gives the logits (B, K) alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def load(request: Request) -> Loaded:
    """The folder's or hub's own weights, unless the request says otherwise. Runs no code from there, and no pickle.

    Raises:
        SourceError: no such folder or id, no image classifier, no safetensors, or weights that don't fit.
    """
    name = request.name
    local = _is_folder(name)
    with _quiet():
        config = _config(request, local)
        try:
            model = _from_config(config)
            weights = request.random_weights
            if file := request.weights_file:
                # Through transformers, which knows how its older checkpoints named things.
                state = checkpoint.read(file)
                source = checkpoint.fingerprint(file)
                model, weights = _filled(type(model), source, None, config=config, state_dict=state)
            elif request.weights != RANDOM:
                model, weights = _filled(type(model), f"hf {name}", name, config=config, local_files_only=local)
        except SourceError:
            raise
        except Exception as error:
            pickled = local and (Path(name) / "pytorch_model.bin").is_file()
            hint = f"; add --weights {Path(name) / 'pytorch_model.bin'}" if pickled else ""
            raise SourceError(f"hf:{name} can't be loaded: {first_line(error)}{hint}") from error
        preprocess, doubt = _preprocess(name, config, local)
    names = tuple(config.id2label[i] for i in range(config.num_labels))
    return Loaded(
        module=ImageClassifier(model),
        preprocess=preprocess,
        preprocess_doubt=doubt,
        origin={"name": name, "config": {**config.to_dict(), "architectures": [type(model).__name__]}},
        weights=weights,
        class_names=None if names[0] == "LABEL_0" else names,
    )


def rebuild(origin: Mapping[str, Any]) -> nn.Module:
    """The architecture with random weights, from the config alone."""
    values = dict(origin["config"])
    with _quiet():
        return ImageClassifier(_from_config(AutoConfig.for_model(values.pop("model_type"), **values)))


def _is_folder(name: str) -> bool:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SourceError(f"{name} has no config.json, so transformers didn't save it")
        return True
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        known = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
        raise SourceError(f"there is no folder {name}{nearest(path.name, known)}")
    return False


def _config(request: Request, local: bool) -> Any:
    config: Any
    options = {"local_files_only": local, "trust_remote_code": False, "return_unused_kwargs": True}
    try:
        config, unused = AutoConfig.from_pretrained(request.name, **options, **request.kwargs)
    except Exception as error:
        raise SourceError(f"hf:{request.name} can't be loaded: {first_line(error)}") from error
    if unused:
        raise SourceError(f"hf:{request.name} takes no {', '.join(unused)} (a {type(config).__name__})")
    if request.num_classes is not None:
        config.num_labels = request.num_classes
    return config


def _from_config(config: Any) -> nn.Module:
    # transformers picks scaled_dot_product_attention itself, where the model can.
    return AutoModelForImageClassification.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _filled(kind: Any, source: str, path: str | None, **options: Any) -> tuple[nn.Module, str]:
    """A model of a class with the weights of a path or state dict, and where they come from, in words."""
    model, info = kind.from_pretrained(
        path,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that they are told, below
        output_loading_info=True,
        **options,
    )
    reshaped = {key: (tuple(theirs), tuple(ours)) for key, theirs, ours in info["mismatched_keys"]}
    unused = sorted(info["unexpected_keys"])
    missing = sorted(key for key in info["missing_keys"] - reshaped.keys() if not key.endswith(checkpoint.OPTIONAL))
    if problem := checkpoint.describe_mismatch(missing, unused if missing else [], reshaped):
        raise SourceError(f"the weights of {source} don't fit the model: {problem}")
    return model, source + (f", {len(unused)} tensors unused ({', '.join(unused[:3])})" if unused else "")


def _preprocess(name: str, config: Any, local: bool) -> tuple[Preprocess, str]:
    """How the images are wanted, and why that may be wrong; empty if it is what the source says."""
    side = getattr(config, "image_size", None) or 224
    h, w = (side, side) if isinstance(side, int) else side
    assumed = Preprocess(size=(h, w), resize=(h, w), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    try:
        processor = AutoImageProcessor.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError):
        return assumed, "it has no image processor that transformers knows"
    preprocess = _translate(processor)
    if preprocess is None or not _agrees(preprocess, processor):
        return assumed, f"its {type(processor).__name__} does more than resize, crop and normalize"
    return preprocess, ""


def _translate(processor: Any) -> Preprocess | None:
    """An image processor's settings; None if they set no fixed size."""

    def setting(key: str) -> Any:
        return getattr(processor, key, None)

    size, crop = dict(setting("size") or {}), dict(setting("crop_size") or {})
    box = (size["height"], size["width"]) if size.get("height") else None
    edge = size.get("shortest_edge")
    resize = box or edge
    taken = (crop["height"], crop["width"]) if setting("do_center_crop") and crop.get("height") else box
    if edge and setting("crop_pct"):  # ConvNeXt: crops below 384 pixels, squashes from there on
        taken, resize = (edge, edge), int(edge / processor.crop_pct) if edge < 384 else (edge, edge)
    if taken is None:
        return None
    # (x f - mean) / std = (x / 255 - mean / 255 f) / (std / 255 f), x in 0..255, f the factor
    factor = 255 * processor.rescale_factor if setting("do_rescale") else 255.0
    factor = 1.0 if abs(factor - 1) < 1e-6 else factor
    mean, std = (processor.image_mean, processor.image_std) if setting("do_normalize") else ([0.0] * 3, [1.0] * 3)
    return Preprocess(
        size=taken,
        resize=resize if setting("do_resize") else None,
        interpolation=Image.Resampling(processor.resample).name.lower(),
        mean=(mean[0] / factor, mean[1] / factor, mean[2] / factor),
        std=(std[0] / factor, std[1] / factor, std[2] / factor),
    )


def _agrees(preprocess: Preprocess, processor: Any) -> bool:
    """Whether both give the same of one smooth image; they don't if the processor does something of its own."""
    y, x = np.mgrid[0:320, 0:480] / 480
    image = Image.fromarray((255 * np.stack([x, y, (x * y)], axis=-1)).astype(np.uint8))  # (320, 480, 3)
    theirs = processor(images=image, return_tensors="np")["pixel_values"][0]  # (3, H, W)
    ours = preprocess(image)
    if theirs.shape != ours.shape:
        return False
    error = np.abs((ours - theirs) * np.reshape(preprocess.std, (3, 1, 1))).max()
    return bool(error <= TOLERANCE + 1 / min(preprocess.size))  # they round half pixels of a crop down: one step


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' bars and notes for a while; what matters is said in our errors."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
