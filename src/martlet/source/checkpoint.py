"""Weights from a file: safetensors, or PyTorch's own format without running code. All keys must fit."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from martlet.core.errors import SourceError, nearest

State = dict[str, Tensor]

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "module", "model_ema", "state_dict_ema", "ema", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
OPTIONAL = "num_batches_tracked"
"""A counter that batch norm doesn't use in evaluation; checkpoints often lack it."""


def load_(module: nn.Module, path: Path, convert: Callable[[State, nn.Module], State] | None = None) -> str:
    """Fills the module with a file's weights, in place. Returns what was loaded, in words.

    convert: renames a state whose keys don't fit as they are; tried once, and its result must fit.

    Raises:
        SourceError: the file is missing, damaged, needs code to load, or doesn't fit.
    """
    state = _strip_prefix(read(path), module)
    problem = mismatch(module, state)
    if problem and convert is not None:
        try:
            converted = convert(dict(state), module)
        except (KeyError, IndexError, AttributeError, RuntimeError, ValueError):
            converted = state  # not a layout that the library knows either
        if not mismatch(module, converted):
            state, problem = converted, ""
    if problem:
        raise SourceError(f"{path.name} doesn't fit the model: {problem}")
    own = module.state_dict()
    module.load_state_dict({key: state.get(key, tensor) for key, tensor in own.items()})
    return fingerprint(path)


def fingerprint(path: Path) -> str:
    """A file's name and the beginning of its digest, to know it again."""
    with path.open("rb") as file:
        return f"{path.name} (sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]})"


def read(path: Path) -> State:
    """The tensors of a file by name, on the CPU. Executes nothing that the file holds.

    Raises:
        SourceError: missing, of an unknown kind, damaged, or not loadable without running code.
    """
    if not path.is_file():
        known = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SourceError(f"there is no weights file {path}{nearest(path.name, known)}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{path} is damaged or no safetensors file: {error}") from None
    if path.suffix in PICKLED:
        return _unwrap(_unpickle(path), path)
    raise SourceError(f"{path}: weights are read from .safetensors or {', '.join(PICKLED)}, not from {path.suffix!r}")


def mismatch(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Which keys don't fit, and how many; empty if all do."""
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith(OPTIONAL)]
    unexpected = [key for key in state if key not in own]
    reshaped = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state}
    reshaped = {key: (theirs, ours) for key, (theirs, ours) in reshaped.items() if theirs != ours}
    return describe_mismatch(missing, unexpected, reshaped)


def describe_mismatch(
    missing: list[str], unexpected: list[str], reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> str:
    """One line on keys that don't fit. reshaped: (shape in the file, shape in the model) by key."""
    shapes = [f"{key} {theirs} where the model has {ours}" for key, (theirs, ours) in reshaped.items()]
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for keys, what in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if keys
    ]
    classes = {theirs[0] for theirs, ours in reshaped.values() if theirs and theirs[1:] == ours[1:]}
    rows = {ours[0] for theirs, ours in reshaped.values() if ours and theirs[1:] == ours[1:]}
    if len(classes) == len(rows) == 1 and all(theirs[1:] == ours[1:] for theirs, ours in reshaped.values()):
        parts.append(f"if that is the classifier, add --num-classes {classes.pop()}")
    return "; ".join(parts)


def _unpickle(path: Path) -> Any:
    """torch.load without code. argparse.Namespace, which many training scripts save along, holds only data."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on formats that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        needs = re.search(r"GLOBAL (\S+)", str(error))
        if needs or "TorchScript" in str(error):
            raise SourceError(
                f"{path} needs code to load ({needs[1] if needs else 'TorchScript'}), which is refused; where you "
                f"trust it, convert it once: load it there and save with "
                f"safetensors.torch.save_file(model.state_dict(), '{path.stem}.safetensors')"
            ) from None
        raise SourceError(f"{path} is damaged or no PyTorch checkpoint") from error


def _unwrap(found: Any, path: Path) -> State:
    """The state dict inside what training scripts save."""
    while isinstance(found, Mapping) and not any(isinstance(value, Tensor) for value in found.values()):
        inner = next((key for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            keys = ", ".join(str(key) for key in list(found)[:5])
            raise SourceError(f"{path} has no tensors under {', '.join(WRAPPERS)}; its keys are {keys or 'none'}")
        found = found[inner]
    if not isinstance(found, Mapping):
        raise SourceError(f"{path} holds a {type(found).__name__}, not tensors by name")
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def _strip_prefix(state: State, module: nn.Module) -> State:
    """Removes what DistributedDataParallel, torch.compile or a trainer put before every name."""
    foreign = [prefix for prefix in PREFIXES if not any(key.startswith(prefix) for key in module.state_dict())]
    while prefix := next((p for p in foreign if state and all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
