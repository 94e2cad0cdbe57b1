"""Exits, cascades and thresholds on models: what is left alone, what is refused, what comes back."""

import math

import numpy as np
import pytest
import torch

from martlet.core import pipeline, store
from martlet.core.errors import RecipeError, UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.engine.stream import Stream
from martlet.engine.torch import Torch
from martlet.graph.stages import leaves, window
from martlet.source import load_model

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


class Noise:
    """Calibration images with labels: half of them what the model's last answer is."""

    def __init__(self, num_images: int = 96, labels: np.ndarray | None = None) -> None:
        self.num_images, self.labels = num_images, labels

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(0, self.num_images, 16):
            yield torch.randn(min(16, self.num_images), 3, 16, 16, generator=generator)


def tiny(seed: int = 3, **kwargs):
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY | kwargs, num_classes=10, seed=seed)


def recipe(text: str) -> Recipe:
    return Recipe.from_yaml(f"martlet: 1\npasses: [{text}]")


def apply(text: str, model=None, images=None):
    return pipeline.run(model or tiny(), recipe(text), Context(images=images or Noise(), seed=1))


@pytest.fixture(scope="module")
def exits():
    """A traced model with exits."""
    return pipeline.traced(apply("mue: {after: [1, 2]}"))


@pytest.mark.parametrize("name", ["linear_exits", "lgvit"])
def test_weights_and_logits_of_the_model_stay(name):
    source = tiny()
    before = {key: value.clone() for key, value in source.module.state_dict().items()}
    done = apply(f"{name}: {{epochs: 2, batch: 32}}", source)
    after = done.module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    images = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(done.module(images), source.module(images))
    assert [step.record["after"] for step in done.steps] == [[1, 2]]


def test_heads_learn():
    record = apply("linear_exits: {epochs: 20, batch: 32, rate: 0.01, augment: none}").steps[0].record["training"]
    losses = [loss for _, loss, _ in record["curve"]]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear_exits: {after: [2, 1]}", r"after is \[2, 1\]; it can be a rising list of blocks"),
        ("lgvit: {after: [0, 1]}", "it can be a rising list of blocks"),
        ("mue: {after: [3]}", "after names 3, and the model has 3 blocks; an exit comes after 1 to 2"),
        ("lgvit: {features: -1.0}", "features is -1.0; it can't be less than 0"),
        ("deer", "has no exits; put linear_exits, lgvit, mue or cascade before it"),
        ("window", "has no exits; put cascade before it"),
        ("window: {width: 1.5}", "width is 1.5; it can be from 0 to 1"),
        ("mue, linear_exits", "'one_exit', which passes\\[0\\] mue breaks; leave one of the two out"),
        (
            "mue, deer: {max_gmacs: 0.00001}",
            "the most an image may cost, 1e-05 GMACs, is below the first exit, which costs",
        ),
        ("mue, deer: {mean_gmacs: 0.00001}", "a mean of 1e-05 GMACs is below the first exit, which costs"),
        (
            "mue, deer: {mean_gmacs: 2.0, max_gmacs: 1.0}",
            "a mean of 2 GMACs is more than the 1 that any image may cost",
        ),
        ("mue, deer: {mean_gmacs: 1.0, max_latency_ms: 1.0}", "in milliseconds or in GMACs, not in both"),
        ("mue, deer: {max_drop: -1.0}", "max_drop is -1.0; it has to be a number, and at least 0"),
        ("mue, deer: {doubt: 1.0}", "doubt is 1.0; it has to be more than 0 and less than 1"),
        ("cascade", "first names no model to ask before this one"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text, message):
    with pytest.raises(RecipeError, match=message) as refused:
        apply(text)
    assert "\n" not in str(refused.value)


def test_a_model_of_one_block_has_no_place_for_exits():
    with pytest.raises(RecipeError, match="a model of 1 block has no place for an exit"):
        apply("mue", tiny(depth=1))


def test_too_few_images_for_the_exits(exits):
    with pytest.raises(
        RecipeError, match="40 calibration images are too few for 3 places to leave at; give 48 or more"
    ):
        apply("deer", exits, Noise(40))


def test_a_risk_that_cannot_be_promised(exits):
    images = Noise(96, np.zeros(96, int))
    with pytest.raises(RecipeError, match="1 % of wrong answers can't be promised from 48 images"):
        apply("deer: {max_risk_pct: 1.0}", exits, images)


@pytest.mark.parametrize(("labels", "wrong"), [(None, "other than the last answer"), (np.arange(96) % 10, "wrong")])
def test_a_promise_says_what_would_break_it(exits, labels, wrong):
    promise = apply("deer: {max_risk_pct: 99.0}", exits, Noise(96, labels)).steps[-1].record["promise"]
    assert promise == f"at most 99 % {wrong} on images like the calibration images, with 95 % confidence"


def test_a_mean_budget_is_kept_and_told(exits):
    done = apply("deer: {mean_gmacs: 0.0003}", exits)
    record = done.steps[-1].record
    assert record["unit"] == "GMACs"
    assert record["mean"] <= 0.0003 < record["gmacs"][-1]
    assert record["mean"] == pytest.approx(
        sum(s * g for s, g in zip(record["share_pct"], record["gmacs"], strict=True)) / 100, rel=1e-4
    )
    bounds = [window(done.module, each).tolist() for each in leaves(done.module)]
    assert [low for low, _ in bounds] == [-math.inf] * 2
    assert min(high for _, high in bounds) < math.inf


def test_a_peak_budget_closes_what_is_behind_it(exits):
    cost = apply("deer: {max_drop: 0.0}", exits).steps[-1].record["gmacs"]
    done = apply(f"deer: {{max_gmacs: {cost[1] * 1.001}}}", exits)
    assert window(done.module, leaves(done.module)[1]).tolist() == [math.inf, math.inf]
    assert len(done.steps[-1].record["gmacs"]) == 2


def test_labels_say_what_is_right(exits):
    wrong = apply("deer: {max_drop: 100.0}", exits, Noise(96, np.full(96, 11))).steps[-1].record
    assert wrong["labels"]
    assert (wrong["right_pct"], wrong["last_right_pct"]) == (0.0, 0.0)
    assert wrong["share_pct"][0] == 100.0  # nothing is lost, so all leave at the first exit


def test_a_window_sends_on_as_many_as_it_should(exits):
    done = apply("window: {coverage: 0.5, width: 0.25}", exits)
    first = leaves(done.module)[0]
    low, high = window(done.module, first).tolist()
    from martlet.graph.stages import run, stages

    with torch.inference_mode():
        found = torch.cat([[*run(stages(done.module)[:1], batch)[0].values()][1] for batch in Noise()])
    assert ((low <= found) & (found < high)).sum() == 24


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An artifact of a smaller model, which takes images that are normalized in another way."""
    folder = tmp_path_factory.mktemp("small") / "out"
    model = load_model(
        "timm:vit_tiny_patch16_224",
        model_kwargs=TINY | {"depth": 1},
        num_classes=10,
        seed=4,
        preprocess={"mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4)},
    )
    with store.writing(folder) as partial:
        store.seal(partial, model, "torch", store.write_model(partial, model, Torch()))
    return folder, model


def test_a_cascade_is_both_models(small, tmp_path):
    folder, first = small
    last, images = tiny(), torch.randn(6, 3, 16, 16)
    done = apply(f"cascade: {{first: ['{folder}']}}", last)
    own = (images * 0.5 + 0.5 - torch.tensor([0.3, 0.4, 0.5])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
        :, None, None
    ]
    with torch.inference_mode():
        alone, later = first.module(own), last.module(images)
        together = ((alone.softmax(1) + later.softmax(1)) / 2).log()
        assert torch.allclose(done.module(images), together, atol=1e-5)
        [exit_] = leaves(done.module)
        window(done.module, exit_).copy_(torch.tensor([math.inf, math.inf]))
        assert torch.allclose(done.module(images), alone, atol=1e-5)
        border = float(alone.softmax(1).amax(1).sort().values[2:4].mean())
        window(done.module, exit_).copy_(torch.tensor([-math.inf, border]))
        sure = alone.softmax(1).amax(1) >= border
        wanted = torch.where(sure[:, None], alone, together)
        assert torch.allclose(done.module(images), wanted, atol=1e-5)
        assert not torch.allclose(done.module(images), torch.where(sure[:, None], together, alone), atol=1e-3)
    with store.writing(tmp_path / "out") as partial:
        store.seal(partial, done, "torch", store.write_model(partial, done, Torch()))
    session = store.load(tmp_path / "out").open(batch=6)
    assert np.allclose(session(images.numpy()), wanted.numpy(), atol=1e-5)
    assert session.exits.tolist() == [0 if each else 1 for each in sure]


def test_a_cascade_without_averaging_ends_in_the_last_models_logits(small):
    last, images = tiny(), torch.randn(2, 3, 16, 16)
    done = apply(f"cascade: {{first: ['{small[0]}'], average: false}}", last)
    with torch.inference_mode():
        assert torch.allclose(done.module(images), last.module(images), atol=1e-6)


@pytest.mark.slow
def test_a_stream_runs_one_of_the_two_models_of_a_cascade(small, tmp_path):
    last = tiny()
    for average in (True, False):
        done = apply(f"cascade: {{first: ['{small[0]}'], average: {str(average).lower()}}}", last)
        with store.writing(tmp_path / f"{average}") as folder:
            store.seal(folder, done, "torch", store.write_model(folder, done, Torch()))
    with pytest.raises(UsageError, match="the second model of this artifact needs what the first gave"):
        Stream.of(store.load(tmp_path / "True").open(), 0.5)
    frames, stream = torch.randn(6, 1, 3, 16, 16), Stream.of(store.load(tmp_path / "False").open(), 1e9)
    with torch.inference_mode():
        for t, frame in enumerate(frames):
            found = stream(frame.numpy())
            assert stream.big_ran == (t < 2)
            same = np.allclose(found, last.module(frame).numpy(), atol=1e-5)
            assert same == stream.big_ran


def test_models_that_do_not_go_together(small):
    with pytest.raises(
        RecipeError, match=r"\(10 classes, 16 × 16 px\) and .*\(10 classes, 32 × 32 px\) don't go together"
    ):
        apply(f"cascade: {{first: ['{small[0]}']}}", tiny(img_size=32))
