"""Answers are a teacher's largest probabilities of just the images that the student sees; nobody is asked twice."""

import numpy as np
import pytest
import torch

from martlet.core import pipeline
from martlet.core.errors import RecipeError, UsageError
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.functional.distillation import divergence, spread
from martlet.source import load_model
from martlet.techniques.distill.fast_distill import FastDistill, Replay

SETTINGS = {"epochs": 2, "batch": 8, "rate": 1e-3, "top": 2}


def vit(seed: int, name: str = "", **kwargs) -> Model:
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2} | kwargs
    model = load_model(
        "timm:vit_tiny_patch16_224",
        model_kwargs=tiny,
        num_classes=5,
        preprocess={"size": (16, 16), "resize": 16},
        seed=seed,
    )
    model.name = name or model.name
    return model


def examples(seed: int = 0) -> Examples:
    pixels = torch.randint(0, 256, (24, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Examples(pixels, None, vit(0).preprocess, "noise")


def spread_by_hand(values: list[float], classes: list[int], n: int) -> list[float]:
    left = (1 - sum(values)) / (n - len(values))
    return [values[classes.index(k)] if k in classes else left for k in range(n)]


def test_what_is_left_is_shared_evenly():
    values, classes = torch.tensor([[0.5, 0.3], [0.9, 0.05]]), torch.tensor([[4, 1], [0, 2]])
    found = spread(values, classes, 5)
    for row, v, c in zip(found.tolist(), values.tolist(), classes.tolist(), strict=True):
        assert row == pytest.approx(spread_by_hand(v, c, 5))
        assert sum(row) == pytest.approx(1)
    assert spread(torch.tensor([[0.25, 0.75]]), torch.tensor([[1, 0]]), 2).tolist() == [[0.75, 0.25]]


@pytest.mark.parametrize("augment", ["crop", "rand-m5"])
def test_a_student_replays_the_crops_that_the_teacher_saw_and_its_answers(augment, monkeypatch):
    """By asking the teacher live, in each step, of the images that the student is shown."""
    teacher, seen = vit(1, "teacher"), []
    loss = Replay.loss

    def look(self, student, batch):
        with torch.no_grad():
            live = teacher.module(batch.images).softmax(1).topk(2, 1)
        values, classes = self.answers.of(batch, batch.step // self.per_epoch)
        torch.testing.assert_close(values, live.values, atol=1e-3, rtol=1e-3)
        assert torch.equal(classes, live.indices)
        seen.append(batch.images)
        return loss(self, student, batch)

    monkeypatch.setattr(Replay, "loss", look)
    technique = FastDistill(augment=augment, **SETTINGS)
    pipeline.run(vit(2), Recipe((technique,)), Context(training=examples(), teacher=teacher, seed=3))
    assert len(seen) == 6
    assert not torch.equal(torch.cat(seen[:3]).sort(0).values, torch.cat(seen[3:]).sort(0).values), "each epoch anew"


def test_another_student_learns_without_the_teacher(tmp_path):
    teacher, folder = vit(1, "teacher"), str(tmp_path / "answers")
    technique = FastDistill(stored=folder, **SETTINGS)
    context = Context(training=examples(), teacher=teacher, seed=3)
    first = pipeline.run(vit(2), Recipe((technique,)), context)
    files = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert files == ["epoch-0.safetensors", "epoch-1.safetensors"]
    size = (tmp_path / "answers" / files[0]).stat().st_size
    assert size < 24 * (2 * 6 + 8) + 700

    class Deaf(torch.nn.Module):
        def forward(self, x):
            raise AssertionError("the teacher was asked again")

    deaf = Model(name="teacher", module=Deaf(), preprocess=teacher.preprocess, num_classes=5, origin={})
    again = pipeline.run(vit(2), Recipe((technique,)), Context(training=examples(), teacher=deaf, seed=3))
    alone = pipeline.run(vit(2), Recipe((technique,)), Context(training=examples(), seed=3))
    for other in (again, alone):
        assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), other.module.parameters(), strict=True))
    told = Kept(tmp_path / "answers").load("epoch-0")
    assert told is not None
    assert told[1]["teacher"] == "teacher"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 4}, "with another seed; give another folder"),
        ({"training": examples(1)}, "with another images"),
        ({"teacher": vit(5, "somebody")}, "with another teacher"),
        ({"technique": {"augment": "none"}}, "with another change"),
        ({"technique": {"top": 3}}, "with another top"),
    ],
)
def test_answers_to_something_else_are_refused(change, said, tmp_path):
    settings = {**SETTINGS, "stored": str(tmp_path / "answers")}
    context = {"training": examples(), "teacher": vit(1, "teacher"), "seed": 3}
    pipeline.run(vit(2), Recipe((FastDistill(**settings),)), Context(**context))
    settings |= change.pop("technique", {})
    with pytest.raises(UsageError, match=said):
        pipeline.run(vit(2), Recipe((FastDistill(**settings),)), Context(**(context | change)))


def test_a_student_comes_near_what_was_kept():
    teacher, images = vit(1, "teacher"), examples()
    technique = FastDistill(epochs=60, batch=24, rate=1e-2, weight_decay=0.0, augment="none", top=3)
    done = pipeline.run(vit(2), Recipe((technique,)), Context(training=images, teacher=teacher))
    x = images.normalize(images.pixels)
    with torch.no_grad():
        wanted = teacher.module(x)
        errors = [float(divergence(m.module(x), wanted)) for m in (vit(2), done)]
    assert errors[1] < 0.2 * errors[0]


def test_what_can_not_be_is_refused():
    with pytest.raises(RecipeError, match="top is 0"):
        FastDistill(top=0)
    with pytest.raises(RecipeError, match="answers are to single images; leave mixup and cutmix out"):
        FastDistill(mixup=0.2)
    other = load_model("timm:vit_tiny_patch16_224", model_kwargs={"embed_dim": 48, "depth": 1}, num_classes=7)
    with pytest.raises(UsageError, match="has 5 classes and"):
        pipeline.run(other, Recipe((FastDistill(),)), Context(training=big(), teacher=vit(1)))


def big() -> Examples:
    return Examples(torch.zeros(4, 3, 224, 224, dtype=torch.uint8), None, vit(0).preprocess, "black")


def test_seeds_are_those_of_the_time(tmp_path):
    """Answers of which a seed was changed are refused in the step that meets it."""
    technique = FastDistill(stored=str(tmp_path / "answers"), **SETTINGS)
    pipeline.run(vit(2), Recipe((technique,)), Context(training=examples(), teacher=vit(1, "teacher"), seed=3))
    kept = Kept(tmp_path / "answers")
    tensors, data = kept.load("epoch-1")
    tensors["seeds"] += np.int64(1)
    kept.save("epoch-1", tensors, data)
    with pytest.raises(UsageError, match="changed by other seeds"):
        pipeline.run(vit(2), Recipe((technique,)), Context(training=examples(), seed=3))
