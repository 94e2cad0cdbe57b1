"""Models that stop early, searched: work by where images leave, times of images that do, thresholds from others."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from martlet import engine
from martlet.core import pipeline, store
from martlet.core.errors import DataError, UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data import open_images
from martlet.data.calibration import Calibration
from martlet.data.examples import Examples
from martlet.engine.staged import StagedSession
from martlet.graph.stages import ask, cumulative_macs, leaves, leaving, stages, window
from martlet.measure import memory
from martlet.measure.macs import macs
from martlet.recipe_search import search, space
from martlet.recipe_search.explain import explain
from martlet.recipe_search.folder import Folder
from martlet.recipe_search.measure import Measure
from martlet.recipe_search.screen import Held, Screen, in_mean, screened, work
from martlet.recipe_search.whole import check_solved, supplied
from martlet.source import load_model

SIZE = 16
TINY = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
EXITS = "linear_exits: {epochs: 1, batch: 16}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "SECONDS", 0.05)
    monkeypatch.setattr(memory, "peak_rss_bytes", lambda *_, **__: 1_000_000)
    monkeypatch.setattr("martlet.recipe_search.peers.check_installed", _missing)


def _missing() -> None:
    raise UsageError("NNCF isn't installed")


def model() -> Any:
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=4, seed=3)


def pictures(n: int, seed: int) -> list[tuple[Image.Image, int]]:
    rng = np.random.default_rng(seed)
    return [(Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)), int(rng.integers(4))) for _ in range(n)]


class Noise:
    num_images, labels = 64, None

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(8):
            yield torch.randn(8, 3, SIZE, SIZE, generator=generator)


@pytest.fixture(scope="module")
def staged() -> Any:
    """A traced model in which some images leave early and others don't."""
    recipe = Recipe.from_yaml(f"martlet: 1\npasses: [{EXITS}]")
    graph = pipeline.traced(pipeline.run(model(), recipe, Context(images=Noise(), seed=0)))
    [exit_] = leaves(graph.module)
    confidences, _ = ask(stages(graph.module), Noise())
    window(graph.module, exit_).copy_(torch.tensor([-np.inf, np.median(confidences)]))
    return graph


def test_where_images_leave_in_torch_is_where_the_staged_model_lets_them(staged, tmp_path) -> None:
    logits, exits = leaving(staged.module, Noise())
    assert 0 < (exits == 0).mean() < 1
    with torch.inference_mode():
        whole = np.concatenate([staged.module(images).numpy() for images in Noise()])
    assert np.array_equal(logits, whole)
    store.seal(tmp_path, staged, "torch", store.write_model(tmp_path, staged, engine.get("torch")))
    session = engine.get("torch").open(tmp_path, batch=8)
    left = [(session(images.numpy()), session.exits)[1] for images in Noise()]
    assert np.array_equal(exits, np.concatenate(left))


def test_work_is_that_of_a_mean_image(staged) -> None:
    each = work(staged)
    first, whole = cumulative_macs(stages(staged.module), (SIZE, SIZE))
    assert [sum(one) for one in each] == [first, whole - first]
    _, exits = leaving(staged.module, Noise())
    share = float((exits == 1).mean())
    assert in_mean(each, exits) == {"integer_macs": 0.0, "float_macs": pytest.approx(first + share * (whole - first))}
    assert in_mean(each, np.ones(4, int))["float_macs"] == whole
    assert in_mean(each[:1], None)["float_macs"] == first


def test_time_is_that_of_images_that_leave_where_images_do(monkeypatch) -> None:
    """By sessions of which each takes as many milliseconds as its images say."""
    its: Any = Measure(None, None, None, None, None, None, 0, lambda *_: None)  # type: ignore[arg-type]
    called: dict[str, list[float]] = {}

    def interleave(runs, **_: Any):
        for name, run in runs.items():
            called[name] = [run()]
        return {name: np.array(2 * ms) for name, ms in called.items()}

    monkeypatch.setattr("martlet.recipe_search.measure.interleave", interleave)
    preprocess = model().preprocess
    images = np.zeros((5, 3, SIZE, SIZE), np.float32) + np.array([10, 1, 10, 10, 1])[:, None, None, None]
    sessions: Any = {"plain": lambda x: 7.0, "early": lambda x: float(x.mean())}
    exits = {"early": np.array([1, 0, 1, 1, 0])}
    found = its.turns(sessions, dict.fromkeys(sessions, preprocess), exits, lambda _: [images[:2], images[2:]])
    assert {name: ms.tolist() for name, ms in found.items()} == {"plain": [7, 7], "early": [6.4, 6.4]}
    assert [len(called), sorted(called)] == [3, ["early 0", "early 1", "plain"]]


def test_exits_are_trained_once_and_get_their_thresholds_from_images_of_their_own(tmp_path) -> None:
    source, target = model(), engine.get("openvino")
    training = Examples.read(open_images(pictures(32, 2)), source.preprocess, source.num_classes)
    pool = Calibration(open_images(pictures(132, 1)), source.preprocess, n=132, seed=0)
    folder = Folder.open(tmp_path / "run", {}, overwrite=False)
    with pytest.raises(DataError, match="here 61, and take 64; give --num-images 138 or more"):
        check_solved(132, 10, True)
    check_solved(138, 10, True)
    check_solved(132, 10, False)
    supply, judged = supplied(pool, 4, True, training, folder)
    assert (supply.apart.num_images, judged.num_images) == (64, 64)
    assert supply.apart.labels.tolist() == pool.labels[4:68].tolist()
    recipes = [Recipe.from_yaml(f"martlet: 1\npasses: [{EXITS}, {more}]") for more in ("deer", "int8, deer")]
    screen = Screen(source, target, replace(supply, apart=Held(supply.apart)), Held(judged), 0)
    plain, *early = [screened(screen, recipe.to_yaml()) for recipe in (Recipe(), *recipes)]
    assert plain["float_macs"] == macs(pipeline.traced(source))
    measure = Measure(source, target, folder, supply, judged, 1, 0, lambda *_: None)
    found = [*measure.measure([Recipe(), *recipes]).values()]
    assert len(list((tmp_path / "run" / "trained").glob("*.safetensors"))) == 1
    for screened_, measured, step in zip(early, found[1:], ("float_macs", "integer_macs"), strict=True):
        assert "why" not in screened_, screened_
        assert screened_["float_macs"] == pytest.approx(measured["float_macs"], rel=0.1)  # on the same images
        assert max(screened_["float_macs"], screened_["integer_macs"]) == screened_[step]
    for recipe in recipes:
        [exits, *_, thresholds] = store.load(measure.files(recipe)).model().steps
        assert exits.record["training"]["images"] == 32
        assert (thresholds.record["images"], thresholds.record["labels"]) == (64, True)


@pytest.mark.slow
def test_what_a_searched_model_with_exits_gains_by_its_thresholds(tmp_path) -> None:
    """From an artifact with exits: thresholds are drawn, and `explain` leaves out both, or thresholds alone."""
    with store.writing(tmp_path / "early", overwrite=False) as folder:
        recipe = Recipe.from_yaml(f"martlet: 1\npasses: [{EXITS}]")
        done = pipeline.run(model(), recipe, Context(images=Noise(), seed=0))
        store.seal(folder, done, "torch", store.write_model(folder, done, engine.get("torch")))
    records = tmp_path / "images"
    for i, (picture, label) in enumerate(pictures(160, 4)):
        (records / str(label)).mkdir(parents=True, exist_ok=True)
        picture.save(records / str(label) / f"{i}.png")
    found = search(
        str(tmp_path / "early"), images=open_images(records), out=tmp_path / "run", max_drop=60.0, candidates=3,
        num_images=132, num_calib=4, threads=1, recipe="deer | bf16",
    )  # fmt: skip
    winner = found.winner.open(batch=1)
    told = explain(tmp_path / "run")
    names = [each.technique for each in told.without]
    if "deer" in names:
        assert isinstance(winner, StagedSession)
        [one] = [each for each in told.without if each.technique == "deer"]
        assert one.values is not None
        assert "deer" not in one.recipe.to_yaml()
    candidates = [point for point in found.document["points"] if point["kind"] == "candidate"]
    assert candidates
    assert all("deer" in point["label"] for point in candidates)
