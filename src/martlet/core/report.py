"""The report document: one JSON, versioned, in which every number carries its unit in its name.

`None` stands for what was not measured, never for zero.
"""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from martlet.core.errors import ArtifactError

VERSION = 1


class Latency(TypedDict):
    """Milliseconds a call at the stated batch; `n` calls."""

    median: float
    p05: float
    p95: float
    n: int


class Ratio(TypedDict):
    """Baseline time over artifact time, paired; low and high bound the median with 90 % confidence."""

    median: float
    low: float
    high: float


class Throughput(TypedDict):
    batch: int
    images_per_s: float


class OpTime(TypedDict):
    """An operation as the engine ran it."""

    name: str
    kind: str
    precision: str
    gmacs: float
    microseconds: float


class Coverage(TypedDict):
    """Per cent of the MACs that the engine ran in each precision, and of those in attention products alone."""

    macs_pct: dict[str, float]
    attention_macs_pct: dict[str, float]
    time_pct: dict[str, float]
    source: str
    """Where this was read (`OpenVINO runtime model`, `ONNX Runtime profile`), or why it couldn't be."""
    ops: list[OpTime]


class Side(TypedDict):
    """One of the two that are compared, on the engine."""

    engine: str
    precision: str
    top1_pct: float | None
    top5_pct: float | None
    n_images: int
    params: int
    weight_bytes: int
    file_bytes: int
    gmacs: float
    latency_ms: Latency
    throughput: list[Throughput]
    peak_rss_bytes: int | None
    coverage: Coverage
    rounded: NotRequired[bool]
    """Some tensor is rounded to fewer values than floating point has."""
    logit_error: NotRequired[float]
    """How far the engine's logits are off those of PyTorch in float32, over the largest: median of the first images."""


class Fidelity(TypedDict):
    """The artifact's logits against the baseline's, on the same images."""

    top1_agreement_pct: float
    kl_mean: float
    logit_sqnr_db: float
    n_images: int


class Layer(TypedDict):
    """Error of one layer's output against the untouched model, each fed by its own predecessors."""

    name: str
    kind: str
    sqnr_db: float


class StepReport(TypedDict):
    name: str
    family: str
    summary: str
    paper: str
    settings: dict[str, Any]
    record: dict[str, Any]
    """What the technique says of what it did: counts and choices, small."""
    seconds: float


class Example(TypedDict):
    """An image on which the two disagree. `jpeg_base64` is a thumbnail of at most 160 px."""

    image: str
    label: str | None
    baseline: str
    baseline_pct: float
    artifact: str
    artifact_pct: float
    jpeg_base64: str


class BlockGroups(TypedDict):
    """What a block has left of an image's patches: how many tokens, and which one each patch is in, in row order; -1 is
    dropped."""

    block: str
    num_tokens: int
    groups: list[int]


class Patches(TypedDict):
    """An image as the model gets it, its patches (down, across), and what each block that reduces tokens made of them.

    `jpeg_base64` is a thumbnail in which each patch is as many pixels.
    """

    image: str
    jpeg_base64: str
    grid: list[int]
    blocks: list[BlockGroups]


class ExitShare(TypedDict):
    """Images that left after a stage. top1_pct: of them; None if there are none, or without labels.

    gmacs, latency_ms: of an image that leaves there, all stages before included, by the median time of each stage.
    """

    share_pct: float
    top1_pct: float | None
    gmacs: float
    latency_ms: float


class ExitExample(TypedDict):
    """An image, and the stage after which it left, from 1. `jpeg_base64` is a thumbnail."""

    image: str
    label: str | None
    artifact: str
    stage: int
    jpeg_base64: str


class Exits(TypedDict):
    """Where the test images left a model that can stop early. max_gmacs: what no image can cost more than."""

    stages: list[ExitShare]
    mean_gmacs: float
    max_gmacs: float
    examples: list[ExitExample]


class Gate(TypedDict):
    """judged: what it looked at: `speed` (unless it is simulated), `size`, `logits` where the engine has to give those
    of PyTorch, and `top-1` or `agreement` if asked."""

    passed: bool
    reasons: list[str]
    judged: list[str]


class Document(TypedDict):
    """report.json."""

    martlet_report: int
    created: str
    """ISO 8601, UTC."""
    command: str | None
    model: dict[str, Any]
    """`name`, `num_classes`, `image_size` [H, W], `weights` (what was loaded, or `random`), `preprocess`, `origin`."""
    recipe: dict[str, Any]
    """`text` (one line), `yaml`, `digest`, `steps` (list of StepReport)."""
    data: dict[str, Any]
    """`images` and `calibration`: each `source`, `n_images`, `labelled`, `skipped` (list of names), `seed`; or None.
    Where the model was trained, `training` too."""
    engine: dict[str, Any]
    """`name`, `version`, `threads`, `batch`, `settings` (precision of the floating-point parts, of each side)."""
    environment: dict[str, Any]
    baseline: Side
    artifact: Side
    alternatives: list[dict[str, Any]]
    """The untouched model in the engine's other precisions, in the same interleaved run: `name`, `latency_ms`, and
    `speedup` over the baseline."""
    speedup: Ratio | None
    """None if the artifact is simulated."""
    fidelity: Fidelity
    layers: list[Layer]
    bits: dict[str, Any]
    """Bits of each tensor kind: weights, linear_inputs, conv_inputs, q, k, v, softmax_output, first and last layer."""
    simulated: bool
    """Something is rounded in a way that the engine has no kernel for, so no number of the artifact's speed counts."""
    examples: list[Example]
    patches: NotRequired[list[Patches]]
    """What became of the patches of a few images; missing where no tokens are reduced."""
    exits: NotRequired[Exits]
    """Where images left, if the artifact can stop early. Its latency is then the mean over images in these shares."""
    gate: Gate
    seconds: dict[str, float]
    """Wall time of each stage of the job, and `total`."""


def environment(
    packages: tuple[str, ...] = ("torch", "timm", "onnx", "openvino", "onnxruntime", "numpy"),
) -> dict[str, Any]:
    """What the numbers were measured on: processor, cores, memory, operating system, versions."""
    import psutil

    versions = {"martlet": metadata.version("martlet"), "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": platform.platform(),
        "versions": versions,
    }


def cpu_flags() -> frozenset[str]:
    """Instruction sets as Linux names them (`avx512_bf16`); empty where the system doesn't tell."""
    return frozenset(_cpu_fields().get("flags", "").split())


def _cpu_fields() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return {}
    lines = (line.partition(":") for line in info.read_text(encoding="utf-8").split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _cpu_name() -> str:
    name, flags = _cpu_fields().get("model name", platform.processor() or platform.machine()), cpu_flags()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return " ".join([name, *(flag for flag in wanted if flag in flags)])


def read(path: Path) -> Document:
    """Reads a report.json.

    Raises:
        ArtifactError: missing, not JSON, or of another version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"can't read the report {path}: {error.strerror}") from None
    except ValueError:
        raise ArtifactError(f"{path} is not a report: it is not JSON") from None
    if not isinstance(document, dict) or document.get("martlet_report") != VERSION:
        found = document.get("martlet_report") if isinstance(document, dict) else None
        raise ArtifactError(f"{path} is a report of version {found}; this Martlet reads version {VERSION}")
    return document  # type: ignore[return-value]
