import numpy as np
import pytest
import torch
from PIL import Image

from martlet.core.errors import DataError
from martlet.data import calibration, open_images
from martlet.data.calibration import Calibration
from martlet.data.preprocess import Preprocess

PREPROCESS = Preprocess(size=(8, 8), resize=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def gray(values) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (value, value, value)) for value in values]


def values(batches) -> list[int]:
    return [round(255 * float(image[0, 0, 0])) for batch in batches for image in batch]


def test_batches_are_float_tensors_and_repeat():
    batches = Calibration(open_images(gray(range(50))), PREPROCESS, n=20, batch_size=8)
    assert batches.num_images == 20
    assert len(batches) == 3
    first = list(batches)
    assert [tuple(batch.shape) for batch in first] == [(8, 3, 8, 8), (8, 3, 8, 8), (4, 3, 8, 8)]
    assert all(batch.dtype == torch.float32 for batch in first)
    assert all(torch.equal(a, b) for a, b in zip(first, batches, strict=True))


def test_the_seed_draws_without_replacement():
    images = open_images(gray(range(50)))
    drawn = values(Calibration(images, PREPROCESS, n=20, seed=5))
    assert len(set(drawn)) == 20
    assert drawn == values(Calibration(images, PREPROCESS, n=20, seed=5))
    assert set(drawn) != set(values(Calibration(images, PREPROCESS, n=20, seed=6)))
    assert sorted(values(Calibration(images, PREPROCESS, n=99))) == list(range(50))


def test_every_image_is_as_likely():
    images = open_images(gray(range(10)))
    counts = np.zeros(10)
    for seed in range(300):
        counts[values(Calibration(images, PREPROCESS, n=3, seed=seed))] += 1
    assert counts.sum() == 900
    assert counts.min() > 60  # 90 expected, deviation 8
    assert counts.max() < 120


def test_images_past_the_budget_are_decoded_again(monkeypatch):
    images = open_images(gray(range(30)))
    held = values(Calibration(images, PREPROCESS, n=12))
    monkeypatch.setattr(calibration, "HELD_BYTES", 12 * 8 * 8 * 3 - 1)
    decoded = Calibration(images, PREPROCESS, n=12)
    assert values(decoded) == sorted(held)
    assert values(decoded) == sorted(held)
    assert decoded.num_images == 12


def test_unreadable_images_do_not_count(tmp_path):
    for i, image in enumerate(gray(range(40))):
        image.save(tmp_path / f"{i:02}.png")
    (tmp_path / "03.png").write_bytes(b"")
    batches = Calibration(open_images(tmp_path), PREPROCESS, n=40)
    assert batches.num_images == 39
    assert sorted(values(batches)) == [i for i in range(40) if i != 3]
    assert batches.images.skipped == ["03.png"]


def test_nothing_to_draw_is_refused():
    with pytest.raises(DataError, match="at least one image"):
        Calibration(open_images(gray([1])), PREPROCESS, n=0)


def test_one_image_that_cannot_be_read_is_none(tmp_path):
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match="has no image that can be read"):
        Calibration(open_images(tmp_path), PREPROCESS)


def test_says_how_far_it_is():
    said = []
    Calibration(open_images(gray(range(4))), PREPROCESS, n=3, progress=lambda *at: said.append(at))
    assert said == [("decode calibration images", i, 3) for i in (1, 2, 3)]
