"""fusegpt takes out the block, and keeps and weighs the units of the pair, that loops over all choices find."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.source import load_model
from martlet.techniques.prune import fusegpt
from martlet.techniques.prune.fusegpt import FuseGPT, influence
from martlet.vit.gradients import FLOOR
from martlet.vit.repair import RIDGE, cut_and_repair_

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3, "mlp_ratio": 0.5}
UNITS, TOKENS = 6, 5


class Noise:
    num_images = 24

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(4):
            yield torch.randn(6, 3, 16, 16, generator=generator)


class Fitted(Noise):
    """All but the first batch, which judges the fit."""

    num_images = 18

    def __iter__(self):
        return itertools.islice(super().__iter__(), 1, None)


def model() -> Model:
    torch.manual_seed(0)
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=5, seed=3)
    for parameter in found.module.requires_grad_(False).parameters():
        parameter.normal_(0, 0.5)
    for linear in (found.module.blocks[1].attn.proj, found.module.blocks[1].mlp.fc2):  # type: ignore[index, union-attr]
        linear.weight.mul_(0.5)
        linear.bias.mul_(0.1)
    return found


@pytest.fixture(scope="module")
def fused() -> Model:
    return pipeline.run(model(), Recipe((FuseGPT(blocks=1),)), Context(images=Noise()))


def by_hand(module: Any, last: bool = True) -> dict[int, float]:
    """How far the last tokens turn without each block; as a fault, the tokens after the block itself."""
    angles = {}
    for number in (1, 2):
        total = count = 0.0
        for images in Noise():
            whole = without = module._pos_embed(module.patch_embed(images))
            for i, block in enumerate(module.blocks):
                if last or i <= number:
                    whole = block(whole)
                    without = without if i == number else block(without)
            for a, b in zip(whole.flatten(0, 1).tolist(), without.flatten(0, 1).tolist(), strict=True):
                dot = sum(p * q for p, q in zip(a, b, strict=True))
                total += dot / (sum(p * p for p in a) * sum(q * q for q in b)) ** 0.5
                count += 1
        angles[number] = 1 - total / count
    return angles


def pair(module: Any, first: int) -> tuple[np.ndarray, np.ndarray]:
    """For every token after the attention of a block: hidden units of its MLP and of the next one's, and what brings
    the token to where both blocks bring it."""
    units, targets = [], []
    for images in Fitted():
        x = module._pos_embed(module.patch_embed(images))
        for block in module.blocks[:first]:
            x = block(x)
        one, two = module.blocks[first], module.blocks[first + 1]
        middle = x + one.attn(one.norm1(x))
        hidden = [each.mlp.act(each.mlp.fc1(each.norm2(middle))) for each in (one, two)]
        units.append(torch.cat(hidden, -1).flatten(0, 1))
        targets.append((two(one(x)) - middle).flatten(0, 1))
    return torch.cat(units).double().numpy(), torch.cat(targets).double().numpy()


def counts(module: Any, after: int) -> np.ndarray:
    """How much the error of each token after a block counts: squared gradients, one number for all patches."""
    total = torch.zeros(TOKENS, dtype=torch.float64)
    for images in Fitted():
        x = module._pos_embed(module.patch_embed(images))
        for block in module.blocks[: after + 1]:
            x = block(x)
        x = x.detach().requires_grad_(True)
        y = x
        for block in module.blocks[after + 1 :]:
            y = block(y)
        logits = module.forward_head(module.norm(y))
        (-logits.log_softmax(1).max(1).values.sum()).backward()
        for gradient in x.grad:  # type: ignore[union-attr]
            total += (gradient.double() ** 2).sum(1)
    patches = max(float(total[1:].mean()), FLOOR * float(total[0]) / (TOKENS - 1))
    weights = np.array([float(total[0])] + [patches] * (TOKENS - 1))
    return np.tile(weights / weights.mean(), Fitted.num_images)


def left_over(x: np.ndarray, y: np.ndarray, weights: np.ndarray, pull: float) -> float:
    root = np.sqrt(weights)[:, None]
    rows = np.concatenate(
        [np.concatenate([x, np.ones((len(x), 1))], 1) * root, np.eye(x.shape[1] + 1)[:-1] * pull**0.5]
    )
    target = np.concatenate([y * root, np.zeros((x.shape[1], y.shape[1]))])
    return float(((rows @ np.linalg.lstsq(rows, target, rcond=None)[0] - target) ** 2).sum())


def kept_by_hand(module: Any, first: int) -> list[int]:
    """Of the units of both MLPs, as many as one had: always that goes without which the best fit is least bad."""
    (x, y), weights = pair(module, first), counts(module, first + 1)
    pull, kept = RIDGE * float((x**2 * weights[:, None]).sum(0).mean()), list(range(2 * UNITS))
    while len(kept) > UNITS:
        costs = {u: left_over(x[:, [k for k in kept if k != u]], y, weights, pull) for u in kept}
        kept.remove(min(costs, key=costs.__getitem__))
    return kept


def test_influence_is_the_one_found_by_hand(fused: Model) -> None:
    module = model().module
    found, expected = influence(module, Noise()), by_hand(module)
    assert found == pytest.approx(expected, rel=1e-4)
    assert fused.steps[0].record["removed"] == [min(expected, key=expected.__getitem__)] == [1]
    assert found != pytest.approx(by_hand(module, last=False), rel=1e-3)  # so this can fail


def test_units_of_both_blocks_are_those_found_by_hand(fused: Model) -> None:
    """The first pair: attention before it has lost nothing, so what comes in is what the whole model has."""
    whole: Any = model().module
    one, two = whole.blocks[0], whole.blocks[1]
    kept = kept_by_hand(whole, 0)
    assert set(kept) - set(range(UNITS))  # some of the removed block's
    assert set(kept) & set(range(UNITS))
    factor = two.norm2.weight / one.norm2.weight
    rows = torch.cat([one.mlp.fc1.weight, two.mlp.fc1.weight * factor])
    torch.testing.assert_close(fused.module.blocks[0].mlp.fc1.weight, rows[kept], rtol=1e-4, atol=1e-5)  # type: ignore[index, union-attr]
    others = [u for u in range(2 * UNITS) if u not in kept]
    assert not torch.allclose(fused.module.blocks[0].mlp.fc1.weight, rows[others], rtol=1e-2)  # type: ignore[index, union-attr]


def test_fusing_loses_less_than_dropping(fused: Model) -> None:
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    whole: Any = model().module
    without = copy.deepcopy(whole)
    del without.blocks[1]
    dropped = pipeline.run(model(), Recipe((FuseGPT(blocks=1, fuse=False),)), Context(images=Noise()))
    assert torch.equal(dropped.module(images), without(images))
    assert dropped.steps[0].record["removed"] == fused.steps[0].record["removed"]
    expected = whole(images)
    lost = [(each(images) - expected).norm() for each in (fused.module, without)]
    assert lost[0] < 0.8 * lost[1]


def test_what_would_lose_more_than_dropping_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any, *args: Any, **more: Any) -> None:
        cut_and_repair_(module, *args, **more)
        with torch.no_grad():
            module.blocks[0].mlp.fc2.weight.normal_(0, 10)

    monkeypatch.setattr(fusegpt, "cut_and_repair_", broken)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    done, dropped = (
        pipeline.run(model(), Recipe((FuseGPT(blocks=1, fuse=fuse),)), Context(images=Noise()))
        for fuse in (True, False)
    )
    assert torch.equal(done.module(images), dropped.module(images))


def test_blocks_that_have_to_stay_are_named() -> None:
    with pytest.raises(RecipeError, match=r"^fusegpt: 3 of 3 blocks can't go; blocks\.0.* at most 2 can"):
        pipeline.run(model(), Recipe((FuseGPT(blocks=3),)), Context(images=Noise()))
    with pytest.raises(RecipeError, match="blocks is how many to take out, not -1"):
        FuseGPT(blocks=-1)


def test_none_taken_out_is_the_original_to_the_bit() -> None:
    images = torch.randn(2, 3, 16, 16)
    same = pipeline.run(model(), Recipe((FuseGPT(blocks=0),)), Context(images=Noise()))
    assert torch.equal(same.module(images), model().module(images))
