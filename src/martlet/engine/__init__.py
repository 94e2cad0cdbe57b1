"""Engines: one file a target."""

from __future__ import annotations

import importlib

from martlet.core.errors import UsageError, nearest
from martlet.engine.base import Engine, Op, Session

ENGINES = {"openvino": "OpenVINO", "onnxruntime": "ONNXRuntime", "torch": "Torch"}

__all__ = ["ENGINES", "Engine", "Op", "Session", "get"]


def get(name: str) -> Engine:
    """The engine of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in ENGINES:
        raise UsageError(f"there is no engine {name!r}{nearest(name, ENGINES)} (known: {', '.join(ENGINES)})")
    return getattr(importlib.import_module(f"martlet.engine.{name}"), ENGINES[name])()
