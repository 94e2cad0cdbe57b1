"""ziplm keeps the hidden units, and fits the weights, that a search of all removals with plain least squares finds."""

import copy

import numpy as np
import pytest
import torch

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.source import load_model
from martlet.techniques.prune.ziplm import ZipLM
from martlet.vit.gradients import FLOOR
from martlet.vit.repair import RIDGE

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "mlp_ratio": 1.0}
UNITS, FEATURES, TOKENS, IMAGES = 12, 12, 5, 24


class Noise:
    num_images = IMAGES

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(4):
            yield torch.randn(6, 3, 16, 16, generator=generator)


def model() -> Model:
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=5, seed=3)
    torch.manual_seed(0)
    for parameter in found.module.requires_grad_(False).parameters():
        parameter.normal_(0, 0.5)
    return found


def seen(module: torch.nn.Module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden units and outputs of the MLP for every token, and how much each counts: what isn't read, FLOOR times as
    much together as the class token."""
    inputs, outputs = [], []
    twin = copy.deepcopy(module)

    def note(_module: object, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)

    twin.blocks[0].mlp.fc2.register_forward_hook(note)  # type: ignore[index, union-attr, operator]
    for images in Noise():
        twin(images)
    weights = np.array([1.0] + [FLOOR / (TOKENS - 1)] * (TOKENS - 1))
    weights /= weights.mean()
    x, y = (torch.cat(each).double().flatten(0, 1).numpy() for each in (inputs, outputs))
    return x, y, np.tile(weights, IMAGES)


def ridge_fit(x: np.ndarray, y: np.ndarray, weights: np.ndarray, towards: np.ndarray, pull: float):
    """Weights (U, O), bias (O,) and what is left of |y - x W - b|² + pull |W - towards|², as one least squares."""
    root = np.sqrt(weights)[:, None]
    rows = np.concatenate(
        [np.concatenate([x, np.ones((len(x), 1))], 1) * root, np.eye(x.shape[1] + 1)[:-1] * pull**0.5]
    )
    target = np.concatenate([y * root, towards * pull**0.5])
    found = np.linalg.lstsq(rows, target, rcond=None)[0]
    return found[:-1], found[-1], float(((rows @ found - target) ** 2).sum())


def by_hand(module: torch.nn.Module, left: int, refit: bool = True) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Units that stay, fc2 and its bias: always that unit goes without which the best fit is least bad."""
    x, y, weights = seen(module)
    fc2 = module.blocks[0].mlp.fc2.weight.double().numpy().T  # type: ignore[index, union-attr]
    pull = RIDGE * float((x**2 * weights[:, None]).sum(0).mean())
    kept = list(range(UNITS))
    while len(kept) > left:
        costs = {}
        for unit in kept:
            rest = [other for other in kept if other != unit]
            if refit:
                costs[unit] = ridge_fit(x[:, rest], y, weights, np.zeros((len(rest), FEATURES)), pull)[2]
            else:  # a fault: what is lost if nothing takes over
                costs[unit] = float(((x[:, [unit]] * fc2[unit]) ** 2 * weights[:, None]).sum())
        kept.remove(min(costs, key=costs.__getitem__))
    pull = RIDGE * float((x[:, kept] ** 2 * weights[:, None]).sum(0).mean())
    weight, bias, _ = ridge_fit(x[:, kept], y, weights, fc2[kept], pull)
    return kept, weight.T, bias


@pytest.fixture(scope="module")
def pruned() -> Model:
    technique = ZipLM(prune_ratio=0.04, groups=("hidden",), multiple=1)
    return pipeline.run(model(), Recipe((technique,)), Context(images=Noise()))


def test_units_and_weights_are_those_found_by_hand(pruned: Model) -> None:
    mlp, whole = pruned.module.blocks[0].mlp, model().module  # type: ignore[index, union-attr]
    left = mlp.fc1.out_features
    assert 2 <= left < UNITS - 2
    kept, weight, bias = by_hand(whole, left)
    assert torch.equal(mlp.fc1.weight, whole.blocks[0].mlp.fc1.weight[kept])  # type: ignore[index, union-attr]
    torch.testing.assert_close(mlp.fc2.weight.double(), torch.from_numpy(weight), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mlp.fc2.bias.double(), torch.from_numpy(bias), rtol=1e-3, atol=1e-4)


def test_this_can_fail(pruned: Model) -> None:
    mlp, whole = pruned.module.blocks[0].mlp, model().module  # type: ignore[index, union-attr]
    kept, _, _ = by_hand(whole, mlp.fc1.out_features, refit=False)
    assert not torch.equal(mlp.fc1.weight, whole.blocks[0].mlp.fc1.weight[kept])  # type: ignore[index, union-attr]


def test_heads_go_as_their_dimensions_do() -> None:
    with pytest.raises(Exception, match=r"^ziplm: groups can be qk, v and hidden"):
        ZipLM(groups=("heads",))
