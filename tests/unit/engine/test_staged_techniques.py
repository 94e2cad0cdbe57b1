"""What makes exits, alone and with int8 behind it, in stages on OpenVINO: answers and exits are those of the graph."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from martlet import engine as engines
from martlet.core import pipeline, store
from martlet.core.facts import Fact
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.engine.staged import StagedSession
from martlet.graph.stages import leaves, run, stages, window
from martlet.source import load_model

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
EXITS = {
    "mue": "mue: {after: [1]}",
    "eco_m2f": "linear_exits: {epochs: 1, batch: 32}, eco_m2f: {beta: 0.0}",
    "dyn_perceiver": "dyn_perceiver: {tokens: 8, epochs: 1, batch: 32}",
}
PLAIN = ", int8: {ranges: minmax, shift: false, smooth: false, split: false, bias_correction: false}"
"""Quick: which kernels run doesn't depend on how ranges are found."""


class Noise:
    """Calibration images, from dark to glaring, with labels by chance: so the gate finds no place best for all."""

    num_images, labels = 32, np.arange(32) % 10

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            scale = torch.linspace(0.2, 2, 16)[:, None, None, None]
            yield torch.randn(16, 3, 32, 32, generator=generator) * scale


def between(confidence: Tensor) -> float:
    """In the widest gap between images that two or more are on either side of."""
    ordered = confidence.sort().values
    gaps = ordered[2:-1] - ordered[1:-2]
    return float(ordered[int(gaps.argmax()) + 1 :][:2].mean())


@pytest.mark.parametrize(
    ("name", "rounded"),
    [
        ("mue", True),
        *(
            pytest.param(name, rounded, marks=pytest.mark.slow)
            for name, rounded in product(EXITS, (False, True))
            if (name, rounded) != ("mue", True)
        ),
    ],
)
def test_answers_and_exits_are_those_of_the_graph(name: str, rounded: bool, tmp_path: Path) -> None:
    engine = engines.get("openvino")
    source = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)
    recipe = Recipe.from_yaml(f"martlet: 1\npasses: [{EXITS[name]}{PLAIN if rounded else ''}]")
    context = Context(images=Noise(), engine="openvino", int8=engine.int8, seed=1)
    done = pipeline.traced(pipeline.run(source, recipe, context))
    images = next(iter(Noise()))[::2]
    [exit_] = leaves(done.module)
    with torch.no_grad():
        (early, confidence, *_), (late,) = ([*given.values()] for given in run(stages(done.module), images))
        border = between(confidence)
        window(done.module, exit_).copy_(torch.tensor([-math.inf, border]))
        wanted = torch.where((confidence >= border)[:, None], early, late)
        assert torch.allclose(done.module(images), wanted, atol=1e-5)
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, done, "openvino", store.write_model(folder, done, engine))
    artifact = store.load(tmp_path / "out")
    session = artifact.open(batch=8, threads=1)
    assert isinstance(session, StagedSession)
    found, scale = torch.from_numpy(session(images.numpy())), (early - late).abs().max()
    assert (found - wanted).abs().max() < (0.05 if rounded else 1e-4) * scale
    assert session.exits.tolist() == [0 if leaves_ else 1 for leaves_ in confidence >= border]
    assert {*session.exits} == {0, 1}
    assert Fact.ONE_EXIT not in done.facts
    if rounded:
        again = artifact.model()
        assert again.facts == done.facts
        with torch.no_grad():
            assert torch.equal(again.module(images), done.module(images))
        ops = session.profile(images.numpy(), repeats=1)
        assert sum(op.macs for op in ops if op.precision == "i8") > 0.9 * sum(op.macs for op in ops)
