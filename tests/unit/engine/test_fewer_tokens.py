"""What fewer tokens give on the engines and after reloading is what they gave in memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from martlet import engine as engines
from martlet.core import pipeline, store
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Technique
from martlet.source import load_model
from martlet.techniques.tokens.evit import EViT
from martlet.techniques.tokens.expedit import Expedit
from martlet.techniques.tokens.ia_red2 import IARED2
from martlet.techniques.tokens.mctf import MCTF
from martlet.techniques.tokens.readout import Readout
from martlet.techniques.tokens.skipvit import SkipViT
from martlet.techniques.tokens.stvit import STViT
from martlet.techniques.tokens.tome import ToMe
from martlet.techniques.tokens.tps import TPS
from martlet.techniques.tokens.turbo import Turbo

TINY = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
TECHNIQUES = (
    ToMe(r={1: 7, 2: 3}, partition="2x2", informativeness=0.3),
    TPS(r={1: 7, 2: 3}),
    MCTF(r={1: 7, 2: 3}),
    EViT(r={1: 7, 2: 3}),
    Turbo(r={1: 7, 2: 3}, alpha=10.0),
    Expedit(clusters=[4, 3], alpha=1),
    IARED2(r={1: 7, 2: 3}, steps=1),
    SkipViT(r={1: 7}),
    STViT(tokens=[3, 2]),
    Readout(),
)


class Noise:
    num_images = 8

    def __iter__(self):
        yield torch.randn(8, 3, 40, 40, generator=torch.Generator().manual_seed(5))


OFTEN = {"tome", "expedit", "readout"}
"""A reduction, one that gives tokens back, and one that is none; the others are asked by make test-all."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("engine_name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(
    "technique",
    [
        pytest.param(technique, id=technique.name, marks=[] if technique.name in OFTEN else [pytest.mark.slow])
        for technique in TECHNIQUES
    ],
)
def test_engines_and_reloading_agree(engine_name: str, technique: Technique, tmp_path: Path) -> None:
    if engine_name == "onnxruntime":
        pytest.importorskip("onnxruntime")
    engine = engines.get(engine_name)
    model = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    done = pipeline.run(model, Recipe((technique,)), Context(images=Noise()))
    x = torch.randn(3, 3, 40, 40, generator=generator)
    with torch.no_grad():
        expected, untouched = done.module(x), model.module(x)
    files = store.write_model(tmp_path, done, engine)
    store.seal(tmp_path, done, engine.name, files)
    artifact = store.load(tmp_path)
    for batch in (1, 3):
        found = artifact.open(batch=batch, threads=1)(x[:batch].numpy())
        np.testing.assert_allclose(found, expected[:batch].numpy(), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(artifact.model().module(x), expected)
    same = technique.name == "readout"  # which is exact; the others' logits differ by more than the tolerance above
    assert torch.allclose(expected, untouched, rtol=1e-3, atol=1e-3) == same


@pytest.mark.parametrize(("technique", "side"), [(ToMe(r={0: 12}), 40), (MCTF(r={0: 2, 1: 1}), 16)])
def test_every_source_may_join_and_none_stay(technique: Technique, side: int, tmp_path: Path) -> None:
    """Engines refuse to select nothing. side: pixels, of patches of 8."""
    engine = engines.get("openvino")
    kwargs = TINY | {"depth": 3, "img_size": side}
    model = load_model("timm:vit_tiny_patch16_224", model_kwargs=kwargs, num_classes=10, seed=3)
    done = pipeline.run(model, Recipe((technique,)), Context())
    store.write_model(tmp_path, done, engine)
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = done.module(x).numpy()
    np.testing.assert_allclose(engine.open(tmp_path, batch=1, threads=1)(x.numpy()), expected, rtol=1e-3, atol=1e-3)
