"""Models as what they are: one file a host library, each with its own preprocessing."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from martlet.core.errors import NumericsError, SourceError, UsageError, nearest
from martlet.source.base import Request, first_line

if TYPE_CHECKING:
    from torch import nn

    from martlet.core.model import Model

__all__ = ["FORMS", "LIBRARIES", "load_model", "load_other", "rebuild", "with_weights"]

LIBRARIES = ("timm", "hf", "torchvision", "martlet")
FORMS = "timm:NAME, hf:FOLDER_OR_ID, torchvision:NAME, martlet:NAME, path/to/file.py:FACTORY, or an artifact folder"
MANIFEST = "artifact.json"


def load_model(
    spec: str,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    trust_code: bool = False,
    preprocess: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Model:
    """Loads a classifier, in evaluation mode, with the preprocessing that its own library states.

    spec: one of FORMS.
    weights: a .safetensors or PyTorch file; `pretrained`, the library's own; `random`; None is random for timm and
    torchvision, and what comes with the model elsewhere.
    num_classes: of the classifier, if not the library's.
    model_kwargs: for the library's constructor (`{"img_size": 384}`).
    trust_code: needed for `file.py:FACTORY`, whose code runs, and for artifacts made from one.
    preprocess: fields of Preprocess to change (`{"size": (384, 384)}`).
    seed: of random weights.

    Raises:
        SourceError: no such model or weights, weights that don't fit, or images of a size that it can't take.
        UsageError: code that isn't trusted, or impossible preprocessing.
        NumericsError: the model gives NaN or infinity.
    """
    import torch

    from martlet.core.model import Model

    if num_classes is not None and num_classes < 1:
        raise UsageError(f"a classifier has at least one class, not {num_classes}")
    library, name = _parse(spec)
    if library == "artifact":
        return _load_artifact(name, trust_code, weights, num_classes, model_kwargs, preprocess)
    try:
        json.dumps(dict(model_kwargs or {}))
    except TypeError as error:
        raise UsageError(f"model kwargs are kept in the artifact, so they must be JSON: {error}") from None
    request = Request(
        name=name,
        weights=None if weights is None else str(weights),
        num_classes=num_classes,
        kwargs=dict(model_kwargs or {}),
        seed=seed,
        trust_code=trust_code,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = _library(library).load(request)
    if loaded.preprocess_doubt and not preprocess:
        raise SourceError(
            f"{spec} doesn't say how it wants its images ({loaded.preprocess_doubt}); "
            f"state at least the size, mean and std of the preprocessing"
        )
    wanted = loaded.preprocess.override(preprocess or {})
    module = loaded.module.eval()
    return Model(
        name=spec,
        module=module,
        preprocess=wanted,
        num_classes=_probe(spec, module, wanted.size),
        origin={"library": library, **loaded.origin, "weights": loaded.weights},
        class_names=loaded.class_names,
    )


def with_weights(spec: str) -> tuple[str, str | None]:
    """A model, and the weights that are named with it: `MODEL=FILE`."""
    model, _, weights = spec.partition("=")
    return model, weights or None


def load_other(other: str | Model, model: Model) -> Model:
    """Another model of as many classes: one that is there, or `MODEL` or `MODEL=FILE`, as `load_model` takes them.

    A library's model comes with the library's own weights, unless some are named. An artifact has everything: that is
    how to give one that wants its images otherwise than its library says.

    Raises:
        MartletError: as `load_model`.
    """
    if not isinstance(other, str):
        return other
    spec, weights = with_weights(other)
    if _parse(spec)[0] == "artifact":
        return load_model(spec, weights=weights)
    return load_model(spec, weights=weights or "pretrained", num_classes=model.num_classes)


def rebuild(origin: Mapping[str, Any], *, trust_code: bool = False) -> nn.Module:
    """The architecture that `Model.origin` describes, in evaluation mode, with weights that mean nothing.

    Needs neither network nor the files the model was loaded from; except for `file.py:FACTORY`, which is run again.

    Raises:
        UsageError: the origin is a Python file, and it isn't trusted.
        SourceError: the installed library can't make it, or the origin names no known library.
    """
    import torch

    library = origin.get("library")
    if library not in (*LIBRARIES, "python_file"):
        raise SourceError(f"this model's origin is {library!r}, which this version of Martlet doesn't know")
    trust = {"trust_code": trust_code} if library == "python_file" else {}
    with torch.random.fork_rng(devices=[]):
        return _library(library).rebuild(origin, **trust).eval()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(f"martlet.source.{name}")
    except ModuleNotFoundError as error:
        if error.name == "transformers":
            raise SourceError("hf: models need transformers: pip install 'martlet[hf]'") from None
        raise


def _parse(spec: str) -> tuple[str, str]:
    """(library, what follows the prefix)."""
    if re.fullmatch(r".+\.py:\w+", spec):
        return "python_file", spec
    prefix, colon, name = spec.partition(":")
    if colon and prefix in LIBRARIES:
        if not name:
            raise SourceError(f"{spec!r} names no model (forms: {FORMS})")
        return prefix, name
    path = Path(spec)
    from martlet.core import store

    if store.find(path):
        return "artifact", spec
    if path.is_dir():
        hint = f"; did you mean hf:{spec}?" if (path / "config.json").is_file() else f" (forms: {FORMS})"
        raise SourceError(f"{spec} is no artifact: it has no {MANIFEST}{hint}")
    if path.suffix == ".py":
        raise SourceError(f"{spec} names no function; type {spec}:FACTORY")
    if colon:
        raise SourceError(f"{prefix!r} is no source of models{nearest(prefix, LIBRARIES)} (forms: {FORMS})")
    import timm

    if timm.is_model(spec.partition(".")[0]):
        raise SourceError(f"{spec!r} doesn't say where it comes from; did you mean timm:{spec}?")
    raise SourceError(f"there is no model {spec!r} (forms: {FORMS})")


def _load_artifact(path: str, trust_code: bool, *options: object) -> Model:
    if any(option is not None for option in options):
        raise UsageError(f"{path} is an artifact, with its own weights, classes and preprocessing: name it alone")
    from martlet.core import store

    return store.load(path).model(trust_code=trust_code)


def _probe(spec: str, module: nn.Module, size: tuple[int, int]) -> int:
    """Runs one gray image. Returns K, the number of classes."""
    import torch

    try:
        with torch.inference_mode():
            logits = module(torch.zeros(1, 3, *size))
    except Exception as error:
        raise SourceError(
            f"{spec} can't take images of {size[0]} × {size[1]} ({first_line(error)}); "
            f"set another size of the preprocessing, or the model's own with --model-kwargs"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != 1:
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise SourceError(f"{spec} gives {shape} for one image, not logits (1, classes)")
    if not torch.isfinite(logits).all():
        raise NumericsError(f"{spec} gives NaN or infinity for a gray image; its weights are damaged")
    return logits.shape[1]
