"""Preprocess gives, bit for bit, what timm's and torchvision's PIL transforms give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from martlet.data.preprocess import Preprocess
from martlet.source.timm import preprocess

sides = st.integers(1, 90)
values = st.tuples(*[st.floats(0.1, 0.9)] * 3)


def noise(w: int, h: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@settings(max_examples=120, deadline=None)
@given(
    image=st.builds(noise, sides, sides, st.integers(0, 9)),
    size=st.one_of(sides.map(lambda s: (s, s)), st.tuples(sides, sides)),
    crop_pct=st.sampled_from([0.5, 0.72, 0.875, 0.9, 0.95, 1.0]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]),
    mean=values,
    std=values,
)
def test_timm(mode, image, size, crop_pct, interpolation, mean, std):
    config = {
        "input_size": (3, *size),
        "crop_pct": crop_pct,
        "crop_mode": mode,
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
    }
    transform = create_transform(**config, is_training=False)
    try:
        expected = transform(image).numpy()
    except ValueError:  # timm asks PIL for a side of zero pixels, where we keep one
        assert min(image.size) * max(size) / crop_pct < max(image.size) * 1.01
        assert preprocess(config)(image).shape == (3, *size)
        return
    np.testing.assert_array_equal(preprocess(config)(image), expected)


@settings(max_examples=60, deadline=None)
@given(image=st.builds(noise, sides, sides, st.integers(0, 9)), resize=sides, crop=sides)
def test_torchvision(image, resize, crop):
    theirs = ImageClassification(crop_size=crop, resize_size=resize, interpolation=InterpolationMode.BILINEAR)
    ours = Preprocess(size=(crop, crop), resize=resize, interpolation="bilinear")
    np.testing.assert_array_equal(ours(image), theirs(image).numpy())


@settings(max_examples=40, deadline=None)
@given(image=st.builds(noise, sides, sides, st.integers(0, 9)), mode=st.sampled_from(["1", "L", "P", "RGBA", "CMYK"]))
def test_every_mode_of_an_image_becomes_rgb(image, mode):
    converted = image.convert(mode)
    ours = Preprocess(size=(24, 24), resize=24)
    np.testing.assert_array_equal(ours(converted), ours(converted.convert("RGB")))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(8, 600).map(lambda s: (s, s)),
    crop_pct=st.sampled_from([0.5, 0.875, 0.9, 1.0]),
    side=st.integers(8, 600),
)
def test_a_new_size_keeps_the_share_of_the_crop(size, crop_pct, side):
    before = Preprocess(size=size, resize=int(size[0] / crop_pct))
    after = before.override({"size": side})
    assert after.size == (side, side)
    assert isinstance(before.resize, int)
    assert isinstance(after.resize, int)
    assert side <= after.resize <= side * before.resize / size[0] < after.resize + 1


@given(st.builds(Preprocess, size=st.tuples(sides, sides), resize=st.one_of(st.none(), sides), mean=values, std=values))
def test_json_keeps_everything(value):
    import json

    assert Preprocess.from_json(json.loads(json.dumps(value.to_json()))) == value


def test_this_can_fail():
    image = noise(60, 40, 0)
    off_by_one = Preprocess(size=(24, 24), resize=31)(image)
    expected = create_transform((3, 24, 24), crop_pct=0.8, interpolation="bicubic", is_training=False)(image).numpy()
    assert not np.array_equal(off_by_one, expected)
