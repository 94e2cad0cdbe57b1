"""A smaller network in int8 on OpenVINO: every product runs in i8, and gives what the graph says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from martlet import engine as engines
from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.source import load_model

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SLOW = ("afm", "comcat", "magnitude", "linformer", "path_ensemble", "minivit")


class Noise:
    num_images = 8

    def __iter__(self):
        yield torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def model() -> Model:
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)


@pytest.mark.parametrize("name", ["svd", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_int8_of_a_smaller_network_runs_as_it_says(name: str, tmp_path: Path) -> None:
    engine = engines.get("openvino")
    context = Context(images=Noise(), engine="openvino", int8=engine.int8, precisions=engine.alternatives())
    done = pipeline.run(model(), Recipe.load(f"{name} | int8"), context)
    engine.lower(done, tmp_path)
    images = next(iter(Noise()))
    session = engine.open(tmp_path, batch=8, precision=done.precision, threads=1)
    with torch.no_grad():
        expected = done.module(images).numpy()
    assert np.abs(session(images.numpy()) - expected).max() < 0.05 * np.abs(expected).max()
    ops = session.profile(images.numpy(), repeats=1)
    whole = sum(op.macs for op in ops)
    assert sum(op.macs for op in ops if op.precision == "i8") > 0.97 * whole
