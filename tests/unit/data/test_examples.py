"""Images to train on are decoded once, changed by their seeds alone, and refused where they don't fit."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from martlet.core.errors import DataError
from martlet.data import open_images
from martlet.data.examples import Examples, moved
from martlet.data.preprocess import Preprocess

PREPROCESS = Preprocess(size=(16, 24), resize=(16, 24))


def images(n: int = 6, label: int = 2):
    rng = np.random.default_rng(0)
    return open_images([(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), i % label) for i in range(n)])


def by_hand(pixels: torch.Tensor, seed: int) -> list[list[list[int]]]:
    """Pixel by pixel, (3, H, W)."""
    channels, h, w = pixels.shape
    down, across = seed % 2**20 % (2 * (h // 8) + 1) - h // 8, (seed >> 20) % 2**20 % (2 * (w // 8) + 1) - w // 8
    out = [[[0] * w for _ in range(h)] for _ in range(channels)]
    for c in range(channels):
        for y in range(h):
            for x in range(w):
                column = w - 1 - x if (seed >> 40) % 2 else x
                if 0 <= y + down < h and 0 <= column + across < w:
                    out[c][y][x] = int(pixels[c, y + down, column + across])
    return out


def test_images_are_moved_and_mirrored_by_their_seeds():
    pixels = torch.randint(0, 256, (12, 3, 16, 24), dtype=torch.uint8)
    seeds = torch.from_numpy(np.random.default_rng(1).integers(2**62, size=12))
    wanted = [by_hand(image, int(seed)) for image, seed in zip(pixels, seeds, strict=True)]
    assert moved(pixels, seeds).tolist() == wanted
    assert len({int(seed >> 40) % 2 for seed in seeds}) == 2


@pytest.mark.parametrize("augment", ["none", "crop", "rand-m9-mstd0.5-inc1"])
def test_what_an_image_becomes_depends_on_its_seed_and_not_on_its_neighbors(augment):
    examples = Examples.read(images(), PREPROCESS, 2)
    seeds = np.arange(6) * 2**41 + 7 * np.arange(6)
    whole = examples.batch(np.arange(6), seeds, augment, 0.5)
    alone = examples.batch(np.array([4]), seeds[[4]], augment, 0.5)
    assert torch.equal(alone[0], whole[4])
    other = examples.batch(np.array([4]), seeds[[4]] + 2**40 + 2**20 + 1, augment, 0.5)
    assert torch.equal(other, alone) == (augment == "none")


@pytest.mark.parametrize("augment", ["rand-m10-inc1", "v0"])
def test_the_strongest_posterizing_leaves_a_bit(augment):
    """Of policies that ask for 0 bits, which not every version of PIL knows."""
    examples = Examples.read(images(), PREPROCESS, 2)
    found = examples.batch(np.arange(150) % 6, np.arange(150), augment)
    assert bool(found.isfinite().all())


def test_they_are_what_the_model_takes():
    pool = images()
    examples = Examples.read(pool, PREPROCESS, 2)
    wanted = torch.from_numpy(np.stack([PREPROCESS(sample.image) for sample in pool]))
    torch.testing.assert_close(examples.normalize(examples.pixels), wanted)
    assert examples.labels.tolist() == [0, 1, 0, 1, 0, 1]
    again = Examples.unlabelled([wanted[:4], wanted[4:]], PREPROCESS)
    assert torch.equal(again.pixels, examples.pixels)
    assert again.labels is None


def test_a_part_is_drawn_by_the_seed_with_its_labels():
    examples = Examples.read(images(20, label=20), PREPROCESS, 20)
    some, others = examples.split(5, 1)
    assert sorted([*some.labels.tolist(), *others.labels.tolist()]) == list(range(20))
    assert len(some) == 5
    assert torch.equal(some.pixels, examples.pixels[some.labels])
    assert some.labels.tolist() != examples.split(5, 2)[0].labels.tolist()
    assert some.digest != others.digest


def test_labels_past_the_head_are_refused():
    with pytest.raises(DataError, match=r"label.* 2, and the model has 2 classes|labels .* reach 2"):
        Examples.read(images(label=3), PREPROCESS, 2)


def test_more_than_the_memory_holds_is_refused_with_what_it_does(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=6 * 3 * 16 * 24))
    with pytest.raises(DataError, match="GB are free; at most 3 fit, so give fewer"):
        Examples.read(images(), PREPROCESS, 2)
