"""Real weights on real images give the accuracy they are known for: source, data and preprocessing together."""

import os
from pathlib import Path

import pytest
import torch

from martlet.data import open_images
from martlet.data.batches import batches
from martlet.source import load_model

ASSETS = Path(os.environ.get("MARTLET_ASSETS", Path(__file__).parents[4] / "shared"))
LITE = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}


@pytest.mark.slow
@pytest.mark.skipif(not (ASSETS / "weights").is_dir(), reason="no real weights: set MARTLET_ASSETS to their folder")
@pytest.mark.parametrize(
    ("name", "preprocess", "images", "n", "correct"),
    [
        ("vit_tiny_patch16_224", {}, "imagenet1k-sample", 500, 406),
        ("vit_tiny_patch16_224", {}, "imagenet1k-val-227px", 650, 540),
        ("efficientnet_lite0", LITE, "imagenet1k-sample", 500, 394),
        ("efficientnet_lite0", LITE, "imagenet1k-val-227px", 650, 528),
    ],
)
def test_top1(name, preprocess, images, n, correct):
    model = load_model(f"timm:{name}", weights=ASSETS / f"weights/{name}.in1k.safetensors", preprocess=preprocess)
    test = open_images(ASSETS / "data" / images)
    test.check_labels(model.num_classes)
    right = seen = 0
    with torch.inference_mode():
        for array, labels, _ in batches(test, model.preprocess, 32):
            predicted = model.module(torch.from_numpy(array)).argmax(1)
            right += int((predicted == torch.tensor(labels)).sum())
            seen += len(labels)
    assert seen == n
    assert abs(right - correct) <= 1  # an image or so may tip over between builds of torch
