"""`path/to/file.py:factory`: a function of yours that returns the model. Runs its code, so it must be trusted."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from martlet.core.errors import SourceError, UsageError, nearest
from martlet.data.preprocess import Preprocess
from martlet.source import checkpoint
from martlet.source.base import PRETRAINED, Loaded, Request, first_line


def load(request: Request) -> Loaded:
    """What the factory returns, with the weights that it gave or those of a file.

    Raises:
        UsageError: the file isn't trusted.
        SourceError: no such file or factory, the code fails, it returns no module, or the weights don't fit.
    """
    if request.weights == PRETRAINED:
        raise SourceError(f"{request.name} brings its own weights; leave --weights away, or name a file")
    kwargs = dict(request.kwargs)
    if request.num_classes is not None:
        kwargs["num_classes"] = request.num_classes
    module = _create(request.name, kwargs, request.trust_code)
    path = Path(request.name.rpartition(":")[0])
    weights = f"as {request.name} gives them (seed {request.seed})"
    if file := request.weights_file:
        weights = checkpoint.load_(module, file)
    return Loaded(
        module=module,
        preprocess=Preprocess(),
        preprocess_doubt="a module says nothing of its images",
        origin={"name": request.name, "kwargs": kwargs, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        weights=weights,
    )


def rebuild(origin: Mapping[str, Any], *, trust_code: bool = False) -> nn.Module:
    """The architecture as the factory makes it today.

    Raises:
        UsageError: the file isn't trusted.
        SourceError: the file is gone or was changed.
    """
    return _create(origin["name"], origin["kwargs"], trust_code, origin["sha256"])


def _create(name: str, kwargs: Mapping[str, Any], trust_code: bool, sha256: str | None = None) -> nn.Module:
    file, _, factory = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        known = [other.name for other in path.parent.glob("*.py")]
        raise SourceError(f"there is no file {path}{nearest(path.name, known)}")
    if not trust_code:
        raise UsageError(f"{name} would run the code of {path}; if you trust it, add --trust-code")
    if sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise SourceError(f"{path} isn't the file that the model was made from; put that one back, or compress again")
    code = _import(path)
    functions = [key for key, value in vars(code).items() if callable(value) and not key.startswith("_")]
    if factory not in functions:
        raise SourceError(f"{path} has no function {factory!r}{nearest(factory, functions)}")
    try:
        module = getattr(code, factory)(**kwargs)
    except Exception as error:
        raise SourceError(f"{name} fails with {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise SourceError(f"{name} returns a {type(module).__name__}, not a torch.nn.Module")
    return module


def _import(path: Path) -> Any:
    """Runs the file as a module of its own; it may import what lies beside it."""
    name = f"martlet_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a class up there
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SourceError(f"{path} fails with {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module
