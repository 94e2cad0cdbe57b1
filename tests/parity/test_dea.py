"""dea chooses as the papers say, by hand on small sets; augments what it chose and nothing else; and resumes."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from colors import colors
from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.data.preprocess import Preprocess
from martlet.data.subset import Subset
from martlet.functional.facility_location import even_shares, facility_location, likeness, stands_for
from martlet.source import load_model
from martlet.techniques.train.dea import Chosen, Dea
from martlet.training import loop

PREPROCESS = Preprocess(size=(16, 16), resize=16)
QUICK = {"epochs": 2, "batch": 8, "augment": "none", "plain": "none", "smoothing": 0.0}


def points(n: int = 12) -> list[list[float]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64).tolist()


def greedy_by_hand(x: list[list[float]], k: int) -> tuple[list[int], list[int]]:
    """Chosen one by one, every gain computed anew; and how many are nearest to each."""
    far = max(math.dist(a, b) for a in x for b in x)
    alike = [[far - math.dist(a, b) for b in x] for a in x]
    chosen: list[int] = []
    for _ in range(k):
        totals = {j: sum(max(row[c] for c in [*chosen, j]) for row in alike) for j in range(len(x)) if j not in chosen}
        chosen.append(max(totals, key=totals.__getitem__))
    nearest = [max(range(k), key=lambda c: row[chosen[c]]) for row in alike]
    return chosen, [nearest.count(c) for c in range(k)]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_choice_is_the_papers(k):
    x = points()
    alike = likeness(torch.tensor(x))
    found = facility_location(alike, k)
    chosen, counts = greedy_by_hand(x, k)
    assert found.tolist() == chosen
    assert stands_for(alike, found).tolist() == counts
    assert sum(counts) == len(x)
    assert facility_location(-alike + alike.max(), k).tolist() != chosen, "with distance for likeness"


def test_chosen_ones_are_near_all():
    """Nearer, in sum, than nearly any other three."""
    x = torch.tensor(points())
    distance = torch.cdist(x, x)

    def total(chosen) -> float:
        return float(distance[:, list(chosen)].amin(1).sum())

    found = total(facility_location(likeness(x), 3).tolist())
    every = sorted(total(c) for c in itertools.combinations(range(len(x)), 3))
    assert found <= every[len(every) // 20]


@pytest.mark.parametrize(
    ("counts", "total", "wanted"),
    [([5, 5, 5], 6, [2, 2, 2]), ([1, 9, 9], 7, [1, 3, 3]), ([4, 4], 3, [2, 1]), ([2, 0, 1], 9, [2, 0, 1])],
)
def test_classes_share_evenly(counts, total, wanted):
    assert even_shares(counts, total) == wanted


def vit(**kwargs) -> Model:
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2} | kwargs
    return load_model(
        "timm:vit_tiny_patch16_224", model_kwargs=tiny, num_classes=3, preprocess={"size": (16, 16), "resize": 16}
    )


def examples(n: int = 30) -> Examples:
    return colors(PREPROCESS, n)


def chosen_by_hand(model: Model, data: Examples, per_class: int) -> tuple[list[int], list[float]]:
    with torch.no_grad():
        logits = model.module.eval()(data.normalize(data.pixels)).double()
    slopes = []
    for row, label in zip(logits.tolist(), data.labels.tolist(), strict=True):
        total = sum(map(math.exp, row))
        slopes.append([math.exp(v) / total - float(k == label) for k, v in enumerate(row)])
    rows, counts = [], []
    for label in range(3):
        mine = [i for i, its in enumerate(data.labels.tolist()) if its == label]
        chosen, sizes = greedy_by_hand([slopes[i] for i in mine], per_class)
        rows += [mine[c] for c in chosen]
        counts += sizes
    return rows, [c * len(counts) / sum(counts) for c in counts]


def test_gradients_choose_and_the_chosen_count_for_many(monkeypatch):
    model, data, seen = vit(), examples(), []
    loss = Chosen.loss

    def look(self, student, batch):
        with torch.no_grad():
            student.eval()
            errors = torch.nn.functional.cross_entropy(student(batch.images), batch.labels, reduction="none").tolist()
            student.train()
        found = loss(self, student, batch)
        seen.append((batch, self.rows.tolist(), self.weights.tolist(), errors, float(found.detach())))
        return found

    monkeypatch.setattr(Chosen, "loss", look)
    pipeline.run(model, Recipe((Dea(chosen=0.4, **QUICK),)), Context(training=data))
    rows, weights = chosen_by_hand(model, data, 4)
    batch, found, counted, errors, value = seen[0]
    assert found == rows
    assert counted == pytest.approx(weights)
    assert max(weights) > 1.2
    mean = sum(e * (weights[i] if i < 12 else 1.0) for i, e in zip(batch.indices, errors, strict=True)) / len(errors)
    assert value == pytest.approx(mean, rel=1e-4)
    assert value != pytest.approx(sum(errors) / len(errors), rel=1e-4), "with all counting for one"
    everything = data.normalize(data.pixels)
    wanted = everything[[rows[i % 12] for i in batch.indices]]
    torch.testing.assert_close(batch.images, wanted)
    assert batch.labels.tolist() == [int(data.labels[rows[i % 12]]) for i in batch.indices]
    assert len(seen) == 2 * (24 // 8)


def test_they_are_chosen_anew_by_the_model_as_it_is_then(monkeypatch):
    models, choose = [], Chosen._choose

    def look(self, student, step):
        models.append((step, chosen_by_hand(Model(**vars(vit()) | {"module": student}), self._all, 4)[0]))
        student.train()
        found = choose(self, student, step)
        assert found[0].tolist() == models[-1][1]
        return found

    monkeypatch.setattr(Chosen, "_choose", look)
    pipeline.run(
        vit(), Recipe((Dea(chosen=0.4, every=2, rate=1e-2, **QUICK | {"epochs": 6}),)), Context(training=examples())
    )
    assert [step for step, _ in models] == [0, 6, 12]
    assert models[0][1] != models[-1][1]


@pytest.mark.parametrize("whole", [False, True])
def test_chosen_images_alone_are_augmented(whole):
    data = examples()
    subset = Subset(data, 5, "none", whole)
    chosen = torch.tensor([3, 9, 12, 20, 29])
    subset.choose_(chosen)
    first = list(range(30)) if whole else chosen.tolist()
    assert len(subset) == len(first) + 5
    assert subset.labels.tolist() == [int(data.labels[i]) for i in [*first, *chosen.tolist()]]
    rows = np.arange(len(subset))
    images, plain = subset.batch(rows, rows + 7, "rand-m9-mstd0.5-inc1", 0.0), data.normalize(data.pixels)
    assert torch.equal(images[: len(first)], plain[first])
    changed = (images[len(first) :] - plain[chosen]).abs().amax((1, 2, 3))
    assert bool((changed > 0).all())
    assert torch.equal(images, subset.batch(rows, rows + 7, "rand-m9-mstd0.5-inc1", 0.0)), "by its seed alone"


class Halt(Exception):
    pass


@pytest.mark.parametrize("stop", [6, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (2, 7))])
def test_stopped_it_goes_on_to_the_same_weights(stop, tmp_path, monkeypatch):
    """In a period, at its end, and after others were chosen."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    technique = Dea(chosen=0.4, every=2, rate=1e-2, **QUICK | {"epochs": 4, "augment": "crop"})

    def halt(what: str, done: int, total: int) -> None:
        if what.startswith("train, loss") and done == stop:
            raise Halt

    def run(**more) -> list[Tensor]:
        context = Context(training=examples(), seed=4, **more)
        return [*pipeline.run(vit(drop_rate=0.1), Recipe((technique,)), context).module.parameters()]

    kept = Kept(tmp_path)
    with pytest.raises(Halt):
        run(kept=kept, progress=halt)
    assert all(torch.equal(a, b) for a, b in zip(run(), run(kept=kept), strict=True))


def test_random_ones_differ_and_count_alike():
    data, model = examples(), vit()
    objective = Dea(chosen=0.4, choice="random").objective(model, Context(seed=1))
    assert isinstance(objective, Chosen)
    objective.learned_from(data)
    objective.begin_step_(model.module, 0)
    assert sorted(objective.rows.tolist()) != sorted(chosen_by_hand(model, data, 4)[0])
    assert len(set(objective.rows.tolist())) == 12
    assert objective.weights.tolist() == [1.0] * 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chosen": 0.0}, "dea: chosen is 0.0; it can be more than 0, up to 1"),
        ({"every": 0}, "dea: every is 0"),
        ({"choice": "loss"}, "dea: choice is 'loss'; it can be gradients, random"),
        ({"plain": "rand-m9"}, "dea: plain is 'rand-m9'; it can be none or crop"),
        ({"mixup": 0.2}, "dea: images are chosen one by one; leave mixup and cutmix out"),
    ],
)
def test_what_can_not_be_is_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        Dea(**settings)
