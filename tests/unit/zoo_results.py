"""The least of what benchmarks/zoo.py writes."""

from __future__ import annotations

from typing import Any


def summary(median: float) -> dict[str, Any]:
    return {"median": median, "p05": median - 0.5, "p95": median + 0.5, "n": 30}


def record(name: str, params: int, macs: int, ms: float | None = None, **export: Any) -> dict[str, Any]:
    """One model, timed at 1 image in `ms` on OpenVINO and in twice that on PyTorch."""
    found: dict[str, Any] = {
        "name": name,
        "counts": {"image_size": [224, 224], "params": params, "macs": macs},
        "export": {
            "techniques": ["fuse", "int8"],
            "refused_by": ["gptq", "svd", "wanda", "tome"],
            "between_images": 0.5,
            "openvino": {"relative_error": 2e-6},
            "onnxruntime": {"relative_error": 3e-6},
        }
        | export,
    }
    if ms is not None:
        times = {"openvino": {"1": summary(ms), "16": summary(12 * ms)}, "torch": {"1": summary(2 * ms)}}
        found["latency"] = {"date": "2026-01-02", "threads": 2, "ms": times}
    return found


def document(*models: dict[str, Any]) -> dict[str, Any]:
    return {
        "benchmark": "zoo",
        "environment": {"cpu": "a CPU", "cores": 2, "versions": {"openvino": "1.2", "torch": "9.9", "timm": "1.0"}},
        "models": list(models),
    }
