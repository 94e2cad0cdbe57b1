"""Documents as a job writes them, in every shape that a page must survive."""

from __future__ import annotations

import base64
import io
import math
import random
from collections.abc import Callable
from typing import Any

from PIL import Image

from martlet.core.report import Document, Latency, Layer, OpTime

HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=alert(1)>&amp;{{ 7*7 }}\x1b[31m\udce9"
YAML = """martlet: 1
passes:
- fuse
- int8:
    range: mse
    smooth: 0.5
"""


def latency(median: float, n: int = 240) -> Latency:
    return {"median": median, "p05": median * 0.94, "p95": median * 1.17, "n": n}


def thumbnail(hue: int) -> str:
    image = Image.new("HSV", (120, 90), (hue, 120, 190)).convert("RGB")
    image.paste(Image.new("HSV", (50, 40), ((hue + 90) % 256, 160, 230)).convert("RGB"), (35, 25))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def vit_layers(depth: int = 12) -> list[Layer]:
    """Layers of a ViT whose error grows with depth, with two bad ones."""
    noise = random.Random(0)
    layers: list[Layer] = [{"name": "patch_embed.proj", "kind": "Conv2d", "sqnr_db": 41.2}]
    for i in range(depth):
        for name, kind, drop in (
            ("attn.qkv", "Linear", 2.0),
            ("attn.qk", "MatMul", 4.0),
            ("attn.av", "MatMul", 3.0),
            ("attn.proj", "Linear", 1.5),
            ("mlp.fc1", "Linear", 1.0),
            ("mlp.fc2", "Linear", 5.0),
        ):
            level = 38 - 10 * i / depth - drop + noise.uniform(-1.5, 1.5)
            level -= 14 if (i, name) in ((depth // 2, "mlp.fc2"), (depth - 2, "mlp.fc2")) else 0
            layers.append({"name": f"blocks.{i}.{name}", "kind": kind, "sqnr_db": level})
    layers.append({"name": "head", "kind": "Linear", "sqnr_db": 24.9})
    return layers


def vit_ops(depth: int = 12) -> list[OpTime]:
    """Operations as an engine's runtime model lists them."""
    noise = random.Random(1)
    ops: list[OpTime] = []
    for i in range(depth):
        for name, kind, precision, gmacs, microseconds in (
            ("qkv/FullyConnected", "FullyConnected", "i8", 0.0218, 95.0),
            ("qk/MatMul", "MatMul", "i8", 0.0075, 61.0),
            ("softmax", "Softmax", "f32", 0.0, 40.0),
            ("av/MatMul", "MatMul", "i8" if i else "f32", 0.0075, 58.0 if i else 104.0),
            ("proj/FullyConnected", "FullyConnected", "i8", 0.0073, 38.0),
            ("fc1/FullyConnected_Gelu", "FullyConnected", "i8", 0.0290, 122.0),
            ("fc2/FullyConnected", "FullyConnected", "i8", 0.0290, 118.0),
            ("norm1/MVN", "MVN", "f32", 0.0, 17.0),
        ):
            ops.append(
                {
                    "name": f"/blocks.{i}/{name}",
                    "kind": kind,
                    "precision": precision,
                    "gmacs": gmacs,
                    "microseconds": microseconds * noise.uniform(0.9, 1.1),
                }
            )
    return ops


def document(**changes: Any) -> Document:
    """A labelled ViT-Ti that passed its gate. `changes` replace top-level fields."""
    doc: Document = {
        "martlet_report": 1,
        "created": "2026-03-01T10:22:31+00:00",
        "command": "martlet compress timm:vit_tiny_patch16_224 --weights vit_tiny_patch16_224.in1k.safetensors "
        "--images imagenet1k-sample/test.parquet --recipe int8 --engine openvino --out vit-tiny-int8/",
        "model": {
            "name": "timm:vit_tiny_patch16_224",
            "num_classes": 1000,
            "image_size": [224, 224],
            "weights": "vit_tiny_patch16_224.in1k.safetensors",
            "preprocess": {
                "size": [224, 224],
                "resize": 248,
                "interpolation": "bicubic",
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
            },
            "origin": {"library": "timm", "name": "vit_tiny_patch16_224", "kwargs": {}},
        },
        "recipe": {
            "text": "fuse | int8(range=mse, smooth=0.5)",
            "yaml": YAML,
            "digest": "9f3c2a77e01b45d8",
            "steps": [
                {
                    "name": "fuse",
                    "family": "fuse",
                    "summary": "Fold batch norms and training-time branches into the convolutions they follow.",
                    "paper": "Jacob et al., Quantization and training of neural networks, 2018, arXiv:1712.05877",
                    "settings": {},
                    "record": {"folded": 0},
                    "seconds": 0.21,
                },
                {
                    "name": "int8",
                    "family": "quantize",
                    "summary": "Round weights and activations of every Linear, convolution and attention product.",
                    "paper": "Xiao et al., SmoothQuant, 2023, arXiv:2211.10438",
                    "settings": {"range": "mse", "smooth": 0.5},
                    "record": {"weights": 50, "activations": 122, "attention_products": 24, "ranges": {"mse": 98}},
                    "seconds": 38.4,
                },
            ],
        },
        "data": {
            "images": {
                "source": "imagenet1k-sample/test.parquet",
                "n_images": 500,
                "labelled": True,
                "skipped": [],
                "seed": 0,
            },
            "calibration": {
                "source": "imagenet1k-val-227px/test.parquet",
                "n_images": 128,
                "labelled": False,
                "skipped": ["n0153/broken.jpg"],
                "seed": 0,
            },
        },
        "engine": {
            "name": "openvino",
            "version": "2026.1.0",
            "threads": 2,
            "batch": 1,
            "settings": {"baseline": "f32", "artifact": "f32"},
        },
        "environment": {
            "cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz (avx2 avx512f avx512_vnni avx512_bf16 amx_int8)",
            "cores": 2,
            "memory_bytes": 16_777_216_000,
            "os": "Linux-6.1.0-x86_64-with-glibc2.36",
            "versions": {"martlet": "0.1.0", "python": "3.11.9", "torch": "2.15.0", "openvino": "2026.1.0"},
        },
        "baseline": {
            "engine": "openvino",
            "precision": "f32",
            "top1_pct": 81.2,
            "top5_pct": 95.4,
            "n_images": 500,
            "params": 5_717_416,
            "weight_bytes": 22_869_664,
            "file_bytes": 22_961_020,
            "gmacs": 1.254,
            "latency_ms": latency(14.71),
            "throughput": [
                {"batch": 1, "images_per_s": 67.9},
                {"batch": 8, "images_per_s": 74.2},
                {"batch": 32, "images_per_s": 71.5},
            ],
            "peak_rss_bytes": 213_400_000,
            "coverage": {
                "macs_pct": {"f32": 100.0},
                "attention_macs_pct": {"f32": 100.0},
                "time_pct": {"f32": 100.0},
                "source": "OpenVINO runtime model",
                "ops": [],
            },
        },
        "artifact": {
            "engine": "openvino",
            "precision": "f32",
            "top1_pct": 81.0,
            "top5_pct": 95.2,
            "n_images": 500,
            "params": 5_717_416,
            "weight_bytes": 5_792_000,
            "file_bytes": 5_951_210,
            "gmacs": 1.254,
            "latency_ms": latency(6.93),
            "throughput": [
                {"batch": 1, "images_per_s": 144.1},
                {"batch": 8, "images_per_s": 181.3},
                {"batch": 32, "images_per_s": 176.0},
            ],
            "peak_rss_bytes": None,
            "coverage": {
                "macs_pct": {"f32": 0.6, "i8": 99.4},
                "attention_macs_pct": {"f32": 4.2, "i8": 95.8},
                "time_pct": {"f32": 15.7, "i8": 84.3},
                "source": "OpenVINO runtime model",
                "ops": vit_ops(),
            },
        },
        "alternatives": [
            {
                "name": "OpenVINO bf16",
                "latency_ms": latency(10.12),
                "speedup": {"median": 1.45, "low": 1.43, "high": 1.48},
            }
        ],
        "speedup": {"median": 2.12, "low": 2.07, "high": 2.18},
        "fidelity": {"top1_agreement_pct": 98.6, "kl_mean": 0.00431, "logit_sqnr_db": 24.9, "n_images": 500},
        "layers": vit_layers(),
        "bits": {
            "weights": 8,
            "linear_inputs": 8,
            "conv_inputs": 8,
            "q": 8,
            "k": 8,
            "v": 8,
            "softmax_output": 8,
            "first_layer": 8,
            "last_layer": 8,
            "norms": 32,
        },
        "simulated": False,
        "examples": [
            {
                "image": f"n0{1440764 + 977 * i}/ILSVRC2012_val_0000{i}293.JPEG",
                "label": ("tench", "king penguin", "academic gown", "mountain bike")[i],
                "baseline": ("tench", "king penguin", "mortarboard", "mountain bike")[i],
                "baseline_pct": (51.2, 62.9, 40.3, 33.8)[i],
                "artifact": ("coho", "albatross", "academic gown", "unicycle")[i],
                "artifact_pct": (48.8, 41.7, 42.1, 30.2)[i],
                "jpeg_base64": thumbnail(60 * i),
            }
            for i in range(4)
        ],
        "patches": [
            {
                "image": "n01440764/tench_7.JPEG",
                "jpeg_base64": thumbnail(30),  # 90 by 120 pixels
                "grid": [3, 4],
                "blocks": [
                    {"block": "blocks.4", "num_tokens": 8, "groups": [0, 0, 1, 2, 3, 0, 4, 4, 5, 6, 4, 7]},
                    {"block": "blocks.8", "num_tokens": 4, "groups": [0, 0, 1, 1, 2, 0, 3, 3, 2, -1, 3, 2]},
                ],
            }
        ],
        "gate": {"passed": True, "reasons": [], "judged": ["speed", "size"]},
        "seconds": {"load": 1.3, "calibrate": 21.7, "quantize": 16.9, "lower": 9.8, "measure": 71.2, "total": 120.9},
    }
    return {**doc, **changes}  # type: ignore[typeddict-item, return-value]


def unlabelled() -> Document:
    doc = document()
    for side in (doc["baseline"], doc["artifact"]):
        side["top1_pct"] = side["top5_pct"] = None
    for example in doc["examples"]:
        example["label"] = None
    doc["data"]["images"]["labelled"] = False
    return doc


def failed() -> Document:
    doc = document(
        gate={
            "passed": False,
            "reasons": [
                "1.3× slower than the baseline",
                "top-1 fell 2.4 points, more than the 1.0 allowed (most expensive in float: /blocks.0/av/MatMul)",
            ],
            "judged": ["speed", "size", "top-1"],
        },
        speedup={"median": 0.77, "low": 0.74, "high": 0.81},
    )
    doc["artifact"] |= {"latency_ms": latency(19.1), "top1_pct": 78.8}
    return doc


def simulated() -> Document:
    doc = document(simulated=True, speedup=None)
    doc["gate"]["judged"] = ["size"]
    doc["bits"] |= {"weights": 3, "softmax_output": "log2, 4 bits"}
    return doc


def bare() -> Document:
    """The least that a document can hold: no images, no profile, no command."""
    doc = unlabelled()
    doc |= {
        "command": None,
        "alternatives": [],
        "layers": [],
        "bits": {},
        "examples": [],
        "patches": [],
        "seconds": {},
        "fidelity": {"top1_agreement_pct": 100.0, "kl_mean": 0.0, "logit_sqnr_db": math.inf, "n_images": 64},
    }
    doc["data"] = {"images": None, "calibration": None}
    doc["recipe"] = {"text": "none", "yaml": "martlet: 1\npasses: []\n", "digest": "0", "steps": []}
    doc["engine"] |= {"threads": None, "settings": {}}
    for side in (doc["baseline"], doc["artifact"]):
        side["throughput"], side["peak_rss_bytes"] = [], None
        side["coverage"] = {"macs_pct": {}, "attention_macs_pct": {}, "time_pct": {}, "source": "nothing", "ops": []}
    return doc


def deep() -> Document:
    """150 layers, names that don't break, negative decibels, precisions nobody has heard of."""
    doc = document(layers=vit_layers(25)[:150])
    doc["layers"][70] = {"name": "stages.3.blocks." + "a_very_long_module_name." * 6, "kind": "Conv2d", "sqnr_db": -7.5}
    doc["layers"][71]["sqnr_db"] = math.inf
    doc["artifact"]["coverage"]["macs_pct"] = {"f32": 4.0, "bf16": 21.0, "i8": 55.0, "u4": 12.0, "nf3": 8.0}
    doc["artifact"]["coverage"]["ops"] = vit_ops(40)
    doc["model"]["name"] = "timm:" + "vit_" * 40
    return doc


def hostile() -> Document:
    """Markup, escapes and a lone surrogate in every string that comes from outside."""

    def poison(value: Any, key: str = "") -> Any:
        if key in ("created", "jpeg_base64"):
            return value
        if isinstance(value, str):
            return value + HOSTILE
        if isinstance(value, list):
            return [poison(item) for item in value]
        if isinstance(value, dict):
            return {
                (name + HOSTILE if key in ("bits", "seconds", "settings", "record") else name): poison(item, name)
                for name, item in value.items()
            }
        return value

    return poison(failed())


ALL: tuple[Callable[[], Document], ...] = (document, unlabelled, failed, simulated, bare, deep, hostile)
