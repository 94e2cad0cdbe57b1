"""A search's document as `martlet search` writes it, with names that try to be markup."""

from __future__ import annotations

import copy
from typing import Any

RECIPE = "martlet: 1\npasses:\n- fuse: {}\n- tome: {r: 4}\n- int8: {}\n"
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def value(number: float, spread: float | None = None) -> dict[str, float | None]:
    if spread is None:
        return {"value": number, "low": None, "high": None}
    return {"value": number, "low": number - spread, "high": number + spread}


def point(
    id_: int, label: str, drop: float, latency: float, megabytes: float, kind: str = "candidate", **more: Any
) -> dict[str, Any]:
    return {
        "id": id_,
        "kind": kind,
        "label": label,
        "recipe": RECIPE if kind == "candidate" else None,
        "command": f"martlet compress timm:vit_tiny_patch16_224 --recipe runs/search/{id_}.yaml --out point-{id_}",
        "stage": "measured",
        "simulated": False,
        "n_images": 500,
        "values": {
            "top1_pct": value(74.6 - drop, 1.1),
            "drop_pct": value(drop, 0.5),
            "latency_ms": value(latency, 0.04 * latency),
            "file_bytes": value(1e6 * megabytes),
            "memory_bytes": value(1e6 * (megabytes + 40)),
        },
        "on_front": False,
        "winner": False,
        "keeps_budget": drop <= 1 and latency <= 8,
        "seconds": 12.5,
        **more,
    }


def document() -> dict[str, Any]:
    """Points 3, 4, 5 and 6 are the front of drop over latency: 7 and 8 are beaten, 9 is simulated, 10 lies far off."""
    return copy.deepcopy(DOCUMENT)


DOCUMENT: dict[str, Any] = {
    "martlet": "0.1.0",
    "created": "2026-03-01T10:00:00",
    "environment": {"cpu": "a CPU", "cores": 2, "versions": {"openvino": "2026.1"}},
    "job": {
        "model": {"name": "timm:vit_tiny_patch16_224", "sha256": "ab" * 8},
        "engine": {"name": "openvino", "version": "2026.1", "threads": 2},
        "images": {"search": "train.parquet", "n_search": 500, "n_test": 1000},
        "budget": {"max_drop_pct": 1.0, "latency_ms": 8.0, "size_mb": 6.5, "minutes": 30},
        "seed": 0,
        "command": "martlet search timm:vit_tiny_patch16_224 --images test.parquet --max-drop 1.0 --latency-ms 8",
    },
    "axes": {
        "top1_pct": {"label": "top-1", "unit": "%", "better": "higher"},
        "drop_pct": {"label": "drop in top-1", "unit": "points", "better": "lower"},
        "latency_ms": {"label": "latency", "unit": "ms", "better": "lower"},
        "file_bytes": {"label": "file", "unit": "bytes", "better": "lower"},
        "memory_bytes": {"label": "memory", "unit": "bytes", "better": "lower"},
    },
    "points": [
        point(0, "original, float32", 0.0, 14.2, 22.9, "reference"),
        point(1, "NNCF int8", 0.3, 8.4, 6.2, "peer"),
        point(2, "OpenVINO bf16", 0.1, 11.0, 11.6, "peer"),
        point(3, "int8, r = 0", 0.2, 7.9, 6.1, on_front=True),
        point(4, "int8, r = 4", 0.6, 6.4, 6.1, on_front=True, winner=True, stage="final", n_images=1000),
        point(5, "int8, r = 8", 1.7, 5.6, 6.0, on_front=True),
        point(6, f"bf16 {EVIL}", 0.1, 10.6, 11.5, on_front=True),
        point(7, "int8, smooth", 0.5, 8.0, 6.1),
        point(8, "evit, 0.7", 1.9, 7.0, 6.2),
        point(9, "gptq-w3", 0.9, 5.0, 3.1, simulated=True),
        point(10, "tome, r = 16", 41.5, 5.9, 6.0),
        point(11, "int8, r = 6", 0.1, 5.5, 6.0, stage="screened", n_images=64),
    ],
    "lost": [{"id": 12, "why": "the worker was killed <b>", "seconds": 30.0}],
    "peers_left_out": {"NNCF fp4": "there is none <i>"},
    "hypervolume": {
        "reference": {"drop_pct": 1.1, "latency_ms": 15.62},
        "found": 9.5,
        "others": 6.25,
        "together": 9.75,
    },
}
