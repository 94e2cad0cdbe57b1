"""dependency cuts what hangs together, as loops over a small network find, repairs it, and rebuilds it elsewhere."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from martlet.core import pipeline, store
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.engine.torch import Torch
from martlet.nn.refit import RIDGE, refit_
from martlet.source import load_model
from martlet.techniques.prune.dependency import Dependency, cut_, untouched
from martlet.vit.budget import total_macs

KWARGS = {"embed_dim": [16, 16, 24, 24], "depth": [1, 1, 1, 1]}


class Noise:
    num_images = 8

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(4, 3, 32, 32, generator=generator)


def model() -> Model:
    preprocess = {"size": (32, 32), "resize": (32, 32)}
    found = load_model("timm:repvit_m0_9", model_kwargs=KWARGS, num_classes=10, preprocess=preprocess, seed=3)
    return pipeline.run(found, Recipe.load("fuse"), Context())


def apply(given: Model, **settings: Any) -> Model:
    return pipeline.run(given, Recipe((Dependency(**settings),)), Context(images=Noise()))


class Small(nn.Module):
    """Two convolutions whose sum a third reads, so that channels of both go together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.norm, self.c, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.norm(self.a(x) + self.b(x)).relu()).mean((2, 3)))


def small() -> Model:
    torch.manual_seed(0)
    like = model()
    return Model(
        name="small", module=Small().eval(), preprocess=like.preprocess, num_classes=10, origin={"library": "none"}
    )


def test_what_hangs_together_goes_together() -> None:
    whole, done = small(), small()
    kept = cut_(done, [("a", True, [1, 4])])
    left = [0, 2, 3, 5]
    assert kept == {"a": left, "b": left}
    old: Any = whole.module
    new: Any = done.module
    for name in ("a", "b"):
        assert torch.equal(getattr(new, name).weight, getattr(old, name).weight[left])
    assert torch.equal(new.norm.running_var, old.norm.running_var[left])
    assert torch.equal(new.c.weight, old.c.weight[:, left])
    assert untouched(old, 10) == [old.head]


@torch.no_grad()
def test_repair_is_the_least_squares_found_by_hand() -> None:
    whole, done = small().module, small()
    kept = cut_(done, [("a", True, [1, 4])])
    before = done.module.get_submodule("c").weight.detach().clone()
    refit_(done.module, whole, kept, ["c"], Noise())
    new: Any = done.module
    old: Any = whole
    rows, targets = [], []
    for images in Noise():
        inside = new.norm(new.a(images) + new.b(images)).relu()
        wanted = old.c(old.norm(old.a(images) + old.b(images)).relu())
        padded = nn.functional.pad(inside, (1, 1, 1, 1))
        places = [(i // 32, i % 32) for i in range(0, 1024, 16)]
        for image, target in zip(padded, wanted, strict=True):
            for y, x in places:
                rows.append(image[:, y : y + 3, x : x + 3].flatten().double().numpy())
                targets.append(target[:, y, x].double().numpy())
    a = np.concatenate([np.stack(rows), np.ones((len(rows), 1))], 1)
    prior = before.flatten(1).double().numpy()
    pull = RIDGE * (a[:, :-1] ** 2).sum(0).mean()
    ridge = np.concatenate([np.eye(36) * pull**0.5, np.zeros((36, 1))], 1)
    solved = np.linalg.lstsq(np.vstack([a, ridge]), np.vstack([np.stack(targets), pull**0.5 * prior.T]), rcond=None)[0]
    np.testing.assert_allclose(new.c.weight.flatten(1).numpy(), solved[:-1].T, rtol=1e-3, atol=1e-5)
    assert np.abs(prior - solved[:-1].T).max() > 1e-2  # what it was before is another


def test_macs_go_and_repair_helps() -> None:
    given = model()
    images = torch.cat([*Noise()])
    with torch.no_grad():
        expected = given.module(images)
        lost = []
        for repair in (True, False):
            done = apply(given, prune_ratio=0.3, repair=repair, multiple=4)
            assert 0.3 <= 1 - total_macs(done) / total_macs(given) < 0.6
            lost.append(float((done.module(images) - expected).norm() / expected.norm()))
    assert lost[0] < lost[1]


def test_it_reloads_and_is_cut_again(tmp_path: Path) -> None:
    done = apply(model(), prune_ratio=0.2, multiple=4)
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, done, "torch", store.write_model(folder, done, Torch()))
    again = store.load(tmp_path / "out").model()
    images = next(iter(Noise()))
    with torch.no_grad():
        assert torch.equal(again.module(images), done.module(images))
    assert total_macs(apply(again, prune_ratio=0.2, multiple=4)) <= 0.8 * total_macs(done)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RecipeError, match=r"^dependency: prune_ratio 0.99 would empty layers of timm:repvit_m0_9; at most"
    ):
        apply(model(), prune_ratio=0.99)
    with pytest.raises(RecipeError, match="prune_ratio is from 0 to less than 1, not 1"):
        Dependency(prune_ratio=1.0)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(RecipeError, match=r"^dependency needs Torch-Pruning: pip install 'martlet\[prune\]'"):
        apply(model())
