"""What others make of the same model, from the same images, to be measured beside what a search found."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from martlet.core import store
from martlet.core.errors import EngineError, MartletError, UsageError
from martlet.core.technique import Batches, Stage

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from martlet.core.model import Model
    from martlet.engine.base import Engine

NNCF = "NNCF int8"
PLAIN, IMAGES = "plain.xml", "images.npy"
SILENT = {"NNCF_CI": "1"}
"""In its environment: nothing is sent to NNCF's makers."""


def prepare(source: Model, engine: Engine, images: Batches, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Artifacts by the name of who made them, written into the folder unless they are there; and why others aren't.

    They run on the engine, and can't be compressed further.
    """
    path = folder / "nncf-int8"
    if engine.name != "openvino":
        return {}, {NNCF: f"its int8 is for openvino, not for {engine.name}"}
    if not (path / store.MANIFEST).is_file():
        floating = next((p for p in ("bf16", "f32") if p in engine.alternatives()), "f32")
        try:
            check_installed()
            calibration = [image[None] for batch in images for image in batch.numpy()]
            with store.writing(path) as partial:
                files = nncf_int8(source.module, calibration, partial, transformer=has_attention(source))
                (partial / "preprocess.json").write_text(json.dumps(source.preprocess.to_json()), encoding="utf-8")
                made = replace(source, name=f"{source.name}, by NNCF", precision=floating)
                store.seal(partial, made, engine.name, files)
        except MartletError as error:
            return {}, {NNCF: str(error)}
    return {NNCF: path}, {}


def nncf_int8(module: nn.Module, images: Iterable[np.ndarray], folder: Path, *, transformer: bool) -> list[str]:
    """Writes what `nncf.quantize` makes of a module for OpenVINO, as NNCF's documentation says. Returns the files.

    In a process of its own, for NNCF changes torch where it is imported.

    images: float32 (1, 3, H, W) each; all are calibrated on. transformer: NNCF's preset for transformers.

    Raises:
        UsageError: NNCF isn't installed. EngineError: it fails; says its last line.
    """
    check_installed()
    import numpy as np
    import openvino as ov
    import torch

    from martlet.engine.openvino import BIN, XML

    with tempfile.TemporaryDirectory() as temporary:
        stacked = np.concatenate(list(images))
        np.save(Path(temporary) / IMAGES, stacked)
        example = torch.from_numpy(stacked[:1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            plain = ov.convert_model(module, example_input=example, input=[(-1, *example.shape[1:])])  # any batch
        ov.save_model(plain, Path(temporary) / PLAIN, compress_to_fp16=False)
        job = json.dumps({"given": temporary, "file": str(folder / XML), "transformer": transformer})
        process = subprocess.run(
            [sys.executable, "-m", __name__, job], env=os.environ | SILENT, capture_output=True, text=True, check=False
        )
    if process.returncode:
        last = next(iter(reversed(process.stderr.strip().splitlines())), f"exit status {process.returncode}")
        raise EngineError(f"NNCF can't quantize this model: {last}")
    return [XML, BIN]


def check_installed() -> None:
    """Raises:
    UsageError: NNCF isn't there.
    """
    if importlib.util.find_spec("nncf") is None:
        raise UsageError("NNCF isn't installed; pip install nncf adds it")


def has_attention(model: Model) -> bool:
    """True if two activations are multiplied as matrices; the model must be a module still."""
    from martlet.graph.sites import sites
    from martlet.graph.trace import trace

    assert model.stage is Stage.MODULE
    return any(site.is_attention for site in sites(trace(model.module, model.preprocess.size)))


def main(job: str) -> None:
    """Quantizes, and saves."""
    import nncf  # pyright: ignore[reportMissingImports] - an extra
    import numpy as np
    import openvino as ov

    asked = json.loads(job)
    images = list(np.load(Path(asked["given"]) / IMAGES)[:, None])  # (1, 3, H, W) each
    quantized = nncf.quantize(
        ov.Core().read_model(Path(asked["given"]) / PLAIN),
        nncf.Dataset(images),
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER if asked["transformer"] else None,
    )
    ov.save_model(quantized, asked["file"], compress_to_fp16=False)


if __name__ == "__main__":
    main(sys.argv[1])
