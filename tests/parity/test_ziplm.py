"""ziplm keeps the hidden units, and fits the weights, that a search of all removals with plain least squares finds."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from martlet.core import pipeline, report
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.source import load_model
from martlet.techniques.prune.ziplm import ZipLM
from martlet.vit.gradients import FLOOR
from martlet.vit.latency_law import read_law
from martlet.vit.repair import RIDGE
from martlet.vit.structure import shape_of
from martlet.vit.view import view

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
    with pytest.raises(RecipeError, match=r"^ziplm: groups can be qk, v and hidden"):
        ZipLM(groups=("heads",))


def law(tmp_path: Path, hidden_ms: float, qk_ms: float) -> str:
    """A table of blocks that take 1 ms, and something for each unit and each dimension of q and k."""
    rows = [
        {"num_heads": h, "qk_dim": d, "v_dim": e, "hidden": u, "latency_ms": 1 + u * hidden_ms + h * d * qk_ms}
        for h, d, e, u in itertools.product((1, 3), (2, 4), (2, 4), (4, 12))
    ]
    path = tmp_path / "blocks.json"
    table = {"engine": "openvino", "cpu": report.environment()["cpu"], "blocks": rows}
    path.write_text(json.dumps(table))
    return str(path)


@pytest.mark.parametrize(("hidden_ms", "qk_ms", "target_ms"), [(0.1, 0.0, 1.75), (0.001, 0.1, 1.95)])
def test_with_a_table_milliseconds_are_cut_until_the_target(
    hidden_ms: float, qk_ms: float, target_ms: float, tmp_path: Path
) -> None:
    """What costs no time stays; and what is left takes the target, but for the last cut, which is under a tenth."""
    path, start = law(tmp_path, hidden_ms, qk_ms), 1 + 12 * hidden_ms + 12 * qk_ms
    technique = ZipLM(prune_ratio=1 - target_ms / start, multiple=1, latency_table=path)
    found = pipeline.run(model(), Recipe((technique,)), Context(images=Noise(), engine="openvino"))
    [block] = view(found.module).blocks
    shape = shape_of(block)
    left_ms = read_law(path, "it", "openvino")(shape)
    assert 0.9 * target_ms <= left_ms <= target_ms
    assert (shape.hidden < 12, shape.qk_dim < 4) == (hidden_ms > qk_ms, qk_ms > hidden_ms)
    with pytest.raises(RecipeError, match="measured on another engine: openvino, and this is onnxruntime"):
        technique.check_engine(Context(engine="onnxruntime"))
    with pytest.raises(RecipeError, match=r"at most \d+% of the time can go from"):
        pipeline.run(
            model(), Recipe((ZipLM(prune_ratio=0.9, multiple=1, latency_table=path),)),
            Context(images=Noise(), engine="openvino"),
        )  # fmt: skip
