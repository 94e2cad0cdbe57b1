import numpy as np
import pytest
from PIL import Image

from martlet.core.errors import ArtifactError, UsageError
from martlet.data.preprocess import Preprocess


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", (224,)),
        ("size", (0, 224)),
        ("size", 224),
        ("resize", 0),
        ("resize", "256"),
        ("resize", True),
        ("fit", "stretch"),
        ("interpolation", "cubic"),
        ("mean", (0.5, 0.5)),
        ("mean", (0.5, 0.5, float("nan"))),
        ("std", (0.2, 0.2, 0.0)),
    ],
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(UsageError, match=field):
        Preprocess(**{field: value})


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean interpolation"):
        Preprocess().override({"interpolaton": "bilinear"})
    with pytest.raises(ArtifactError, match="unknown keys"):
        Preprocess.from_json({"sise": [1, 1]})
    with pytest.raises(ArtifactError, match="size"):
        Preprocess.from_json({"size": [1]})


def test_override_takes_what_json_and_the_command_line_give():
    changed = Preprocess(resize=(256, 256)).override({"size": 112, "mean": [0.1, 0.2, 0.3]})
    assert changed == Preprocess(size=(112, 112), resize=(128, 128), mean=(0.1, 0.2, 0.3))
    assert Preprocess().override({"size": [96, 64], "resize": None}) == Preprocess(size=(96, 64), resize=None)
    assert Preprocess(size=(200, 200), resize=220).override({"size": (100, 200)}) == Preprocess(
        size=(100, 200), resize=(110, 220), fit="cover"
    )


def test_normalize_takes_batches():
    wanted = Preprocess(size=(4, 6), resize=None)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    stacked = np.stack([wanted.crop(image)] * 2)
    assert stacked.shape == (2, 4, 6, 3)
    np.testing.assert_array_equal(wanted.normalize(stacked)[1], wanted(image))
    value = np.asarray(image)[1, 2, 0] / np.float32(255)
    assert wanted(image)[0, 1, 2] == pytest.approx((value - 0.485) / 0.229, rel=1e-6)
