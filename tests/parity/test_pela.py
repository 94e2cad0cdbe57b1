"""pela's loss is its paper's, number by number; factors that it trains are better, and nearer to their weights."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.nn.low_rank import LowRankLinear
from martlet.source import load_model
from martlet.techniques.low_rank.pela import PELA
from martlet.techniques.low_rank.svd import SVD
from martlet.training.objective import Batch

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SVD_HALF = SVD(ratio=0.4, multiple=1, allocation="same")


class Pictures:
    num_images = 8

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(5)
        yield 2 * torch.rand(8, 3, 16, 16, generator=generator) - 1


def model() -> Model:
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=5, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return found


def apply(given: Model, *techniques: Any, **context: Any) -> Model:
    return pipeline.run(given, Recipe(techniques), Context(images=Pictures(), **context))


def tokens(module: Any, images: Tensor) -> list[np.ndarray]:
    found, x = [], module.norm_pre(module._pos_embed(module.patch_embed(images)))
    for block in module.blocks:
        x = block(x)
        found.append(x.double().numpy())
    return found


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@torch.no_grad()
def by_hand(student: Any, whole: Any, images: Tensor, technique: PELA, largest: bool = True) -> float:
    """The loss, from the modules alone; as a fault, with the root of the mean square for the largest change."""
    p, q = (softmax(each(images).double().numpy()) for each in (whole, student))
    loss = float((p * (np.log(p) - np.log(q))).sum() / len(p))
    pairs = list(zip(tokens(student, images), tokens(whole, images), strict=True))
    loss += technique.features * sum(((a - b) ** 2).mean() for a, b in pairs) / len(pairs)
    changes = []
    for name, factors in student.named_modules():
        if isinstance(factors, LowRankLinear):
            change = factors.up.weight.double().numpy() @ factors.down.weight.double().numpy()
            change = np.abs(change - whole.get_submodule(name).weight.double().numpy())
            changes.append(change.max() if largest else (change**2).mean() ** 0.5)
    return loss + technique.perturbation * sum((c - technique.limit) ** 2 for c in changes) / len(changes)


@pytest.mark.parametrize("technique", [PELA(), PELA(features=0.0, perturbation=3.0, limit=0.05)], ids=["usual", "held"])
def test_loss_is_the_papers(technique: PELA) -> None:
    given = model()
    student = apply(given, SVD_HALF)
    images = next(iter(Pictures()))
    batch = Batch(images=images, labels=None, indices=np.arange(8), seeds=np.arange(8), step=0, steps=1)
    found = float(technique.objective(student, Context(teacher=given)).loss(student.module, batch).detach())
    assert found == pytest.approx(by_hand(student.module, given.module, images, technique), rel=1e-4)
    assert found != pytest.approx(by_hand(student.module, given.module, images, technique, largest=False), rel=1e-2)


def test_training_gives_back_what_factors_lost_and_holds_them() -> None:
    given = model()
    images = next(iter(Pictures()))
    usual: dict[str, Any] = {"epochs": 40.0, "batch": 8, "rate": 1e-2, "augment": "none", "weight_decay": 0.0}
    plain = apply(given, SVD_HALF)
    free, held = (apply(given, SVD_HALF, PELA(**usual, perturbation=perturbation)) for perturbation in (0.0, 100.0))
    with torch.no_grad():
        lost = [float((each.module(images) - given.module(images)).norm()) for each in (plain, free, held)]
    assert lost[1] < 0.75 * lost[0]
    assert lost[2] < lost[0]

    def change(done: Model) -> float:
        return max(
            float((factors.weight - given.module.get_submodule(name).weight).abs().max().detach())  # type: ignore[operator]
            for name, factors in done.module.named_modules()
            if isinstance(factors, LowRankLinear)
        )

    assert change(held) < change(free)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(
        RecipeError, match=r"^pela: nothing of .* is factorized yet; put what factorizes before it: svd"
    ):
        apply(model(), PELA())
    other = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY | {"embed_dim": 32}, num_classes=5, seed=3)
    with pytest.raises(RecipeError, match=r"^pela: the teacher timm:vit_tiny.* has no Linear .* at blocks\.0"):
        apply(model(), SVD_HALF, PELA(), teacher=other)
    with pytest.raises(RecipeError, match=r"pela: limit is -1\.0; it can't be less than 0"):
        PELA(limit=-1.0)
