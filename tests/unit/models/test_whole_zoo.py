"""What takes minutes: each family trains on real images, and timm's architectures run as the zoo's own do."""

from random import Random

import numpy as np
import pytest
import torch
from families import FAMILIES, Noise, images
from torch.nn.functional import cross_entropy, interpolate

from martlet import engine as engines
from martlet import models
from martlet.core import pipeline, store
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Stage
from martlet.data import open_images
from martlet.models.papers.timm import PAPERS
from martlet.models.random_weights import randomize_
from martlet.source import load_model
from martlet.techniques.quantize.int8 import Int8

pytestmark = pytest.mark.slow

STEPS, BATCH = 50, 32


@pytest.fixture(scope="module")
def cifar10(assets):
    """Training images (STEPS · BATCH, 3, 32, 32), normalized, and their labels; the file has them class by class."""
    found = list(open_images(assets / "data" / "cifar10" / "train.parquet", limit=STEPS * BATCH))
    Random(0).shuffle(found)
    pixels = torch.from_numpy(np.stack([np.asarray(sample.image.convert("RGB")) for sample in found]))
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor([sample.label for sample in found])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_falls_on_cifar10(name, cifar10):
    pixels, labels = cifar10
    torch.manual_seed(0)
    model = models.create(name, num_classes=10, **FAMILIES[name].tiny).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for x, y in zip(pixels.split(BATCH), labels.split(BATCH), strict=True):
        loss = cross_entropy(model(interpolate(x, FAMILIES[name].size, mode="bilinear")), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == STEPS
    assert sum(losses[-10:]) / 10 < min(2.25, 0.95 * losses[0])  # ln 10 = 2.30 is chance


SIDES = {
    "efficientvit_m0": 224,
    "efficientvit_b1": 64,
    "efficientvim_m1": 224,
    "tf_efficientnetv2_s": 64,
    "efficientnet_b0": 64,
    "efficientformer_l1": 224,
    "tiny_vit_5m_224": 224,
    "mobilevitv2_050": 64,
    "repvit_m0_9": 64,
    "gernet_s": 64,
    "convit_tiny": 224,
    "fastvit_t8": 64,
    "mobilevit_xxs": 64,
    "shvit_s1": 64,
    "vovnet39a": 64,
    "nextvit_small": 64,
    "tnt_s_patch16_224": 224,
    "crossvit_tiny_240": 240,
}
"""The smallest of each of timm's families, and images as small as it takes without other parameters."""


def test_every_family_of_timms_is_there():
    assert [sum(name in SIDES for name in paper.models) for paper in PAPERS] == [1] * len(PAPERS)


@pytest.mark.parametrize("name", SIDES)
def test_timms_architectures_run_as_the_zoos_own(name, tmp_path):
    size = (SIDES[name], SIDES[name])
    model = load_model(models.spec(name), num_classes=5, weights="random", preprocess={"size": size})
    x = images(size, 2)
    randomize_(model.module, images=images(size, 16))
    logits = model.module.eval()(x)
    (logits * torch.randn(logits.shape)).sum().backward()
    assert [key for key, value in model.module.named_parameters() if value.grad is None or not value.grad.any()] == []
    model.module.zero_grad()
    expected = logits.detach().numpy()
    scale = np.abs(expected).max()
    fused = pipeline.run(model, Recipe.load("fuse"), Context())
    with torch.no_grad():
        assert np.abs(fused.module(x).numpy() - expected).max() < 1e-4 * scale
    pipeline.enter_(fused, Stage.GRAPH)
    for engine in ("openvino", "onnxruntime"):
        folder = tmp_path / engine
        folder.mkdir()
        store.write_model(folder, fused, engines.get(engine))
        found = engines.get(engine).open(folder, batch=2)(x.numpy())
        assert np.abs(found - expected).max() < 1e-3 * scale, engine
    assert np.abs(found[::-1] - expected).max() > 0.01 * scale  # the comparison can fail
    rounded = pipeline.run(fused, Recipe((Int8(),)), Context(images=Noise(size), int8=engines.get("openvino").int8))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) / 100
    with torch.no_grad():
        error, steep = (
            np.linalg.norm(logits.numpy() - expected) / np.linalg.norm(expected)
            for logits in (rounded.module(x), model.module(x + noise))
        )
    # With random weights the logits of some change by half for a hundredth of noise on the image alone.
    assert 0 < error < max(0.5, 4 * steep)
