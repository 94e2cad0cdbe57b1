import numpy as np
import pytest
from PIL import Image

from martlet.core.errors import DataError, NumericsError, UsageError
from martlet.data import open_images
from martlet.data.preprocess import Preprocess
from martlet.measure.accuracy import logits, topk_pct

PREPROCESS = Preprocess(size=(4, 4), resize=None, mean=(0, 0, 0), std=(1, 1, 1))
GRAYS = [10, 20, 30, 40, 50, 60, 70]


class Brightness:
    """A session whose logits are (mean, 2 mean); `bad` is the gray value that gives NaN."""

    threads = 1
    exits = None

    def __init__(self, batch: int, bad: int | None = None) -> None:
        self.batch, self.bad, self.calls = batch, bad, 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        assert images.shape == (self.batch, 3, 4, 4)
        self.calls += 1
        mean = images.mean((1, 2, 3))
        if self.bad is not None:
            mean = np.where(np.isclose(mean, self.bad / 255), np.nan, mean)
        return np.stack([mean, 2 * mean], axis=1)


@pytest.fixture
def images():
    pictures = [Image.new("RGB", (4, 4), (gray,) * 3) for gray in GRAYS]
    return open_images([(picture, i % 2) for i, picture in enumerate(pictures)])


def test_every_image_once_whatever_the_batch(images):
    seen: list[tuple[int, int]] = []
    sessions = {"one": Brightness(3), "two": Brightness(3)}
    result = logits(sessions, images, PREPROCESS, lambda what, done, total: seen.append((done, total)))
    expected = np.array(GRAYS) / 255
    for name in sessions:
        np.testing.assert_allclose(result.values[name], np.stack([expected, 2 * expected], 1), rtol=1e-6)
        assert sessions[name].calls == 3  # 3 + 3 + 1
    assert result.labels == [0, 1, 0, 1, 0, 1, 0]
    assert len(set(result.names)) == 7
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_nan_names_the_session_and_the_image(images):
    with pytest.raises(NumericsError, match=r"artifact gives NaN or infinity, first for the image .*\[4\]"):
        logits({"baseline": Brightness(3), "artifact": Brightness(3, bad=50)}, images, PREPROCESS)


def test_sessions_share_a_batch_size(images):
    with pytest.raises(UsageError, match=r"one batch size, not \[2, 3\]"):
        logits({"a": Brightness(2), "b": Brightness(3)}, images, PREPROCESS)


def test_images_that_all_fail_are_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError):
        logits({"a": Brightness(1)}, open_images(tmp_path), PREPROCESS)


def test_top_k_counts_by_hand():
    values = np.array([[3.0, 2, 1], [1, 2, 3], [2, 3, 1], [1, 1, 0]])
    labels = [0, 0, 0, 1]
    assert topk_pct(values, labels, 1) == 25  # the tie goes to the smaller class, as with argmax
    assert topk_pct(values, labels, 2) == 75
    assert topk_pct(values, labels, 5) == 100


def test_images_without_a_label_dont_count():
    values = np.eye(3)
    assert topk_pct(values, [0, None, 0], 1) == 50
    assert topk_pct(values, [None, None, None], 1) is None
