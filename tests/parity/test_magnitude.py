"""magnitude cuts the units that a sum over their weights, one by one, says are the smallest."""

import pytest
import torch

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.source import load_model
from martlet.techniques.prune.magnitude import Magnitude

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "mlp_ratio": 2.0}
DIM = 4


def model() -> Model:
    """With rows and columns that are large in different units."""
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=5, seed=3)
    for parameter in found.module.requires_grad_(False).parameters():
        parameter.normal_()
    found.module.blocks[0].attn.proj.weight.mul_(3)  # type: ignore[index, union-attr]
    return found


def smallest(model: Model, columns: bool = True) -> list[int]:
    """Hidden units by the sum of squares of their weights, the smallest first; one number at a time."""
    mlp = model.module.blocks[0].mlp  # type: ignore[index, union-attr]
    totals = []
    for unit in range(24):
        total = float(mlp.fc1.bias[unit]) ** 2
        for feature in range(12):
            total += float(mlp.fc1.weight[unit, feature]) ** 2
            total += float(mlp.fc2.weight[feature, unit]) ** 2 if columns else 0.0
        totals.append(total)
    return sorted(range(24), key=totals.__getitem__)


def smallest_of_head(model: Model, head: int, columns: bool = True) -> list[int]:
    """Dimensions of the head's values, as above."""
    attention = model.module.blocks[0].attn  # type: ignore[index, union-attr]
    totals = []
    for d in range(DIM):
        row = 24 + head * DIM + d
        total = float(attention.qkv.bias[row]) ** 2
        for feature in range(12):
            total += float(attention.qkv.weight[row, feature]) ** 2
            total += float(attention.proj.weight[feature, head * DIM + d]) ** 2 if columns else 0.0
        totals.append(total)
    return sorted(range(DIM), key=totals.__getitem__)


def pruned(model: Model, group: str) -> Model:
    technique = Magnitude(prune_ratio=0.05, groups=(group,), multiple=2, repair=False)
    return pipeline.run(model, Recipe((technique,)), Context(images=Images()))


class Images:
    num_images = 2

    def __iter__(self):
        yield torch.zeros(2, 3, 16, 16)


@pytest.mark.parametrize("columns", [True, pytest.param(False, id="a fault in the oracle")])
def test_hidden_units_are_those_of_the_largest_weights(columns: bool) -> None:
    before = model()
    after = pruned(before, "hidden").module.blocks[0].mlp  # type: ignore[index, union-attr]
    left = after.fc1.out_features
    assert left < 24
    kept = sorted(smallest(before, columns)[24 - left :])
    mlp = before.module.blocks[0].mlp  # type: ignore[index, union-attr]
    same = torch.equal(after.fc1.weight, mlp.fc1.weight[kept]) and torch.equal(
        after.fc2.weight, mlp.fc2.weight[:, kept]
    )
    assert same == columns


@pytest.mark.parametrize("columns", [True, pytest.param(False, id="a fault in the oracle")])
def test_dimensions_of_values_are_those_of_the_largest_weights(columns: bool) -> None:
    before = model()
    after = pruned(before, "v").module.blocks[0].attn  # type: ignore[index, union-attr]
    kept = [
        24 + h * DIM + d for h in range(3) for d in sorted(smallest_of_head(before, h, columns)[DIM - after.v_dim :])
    ]
    assert after.v_dim == 2
    expected = before.module.blocks[0].attn.qkv.weight[kept]  # type: ignore[index, union-attr]
    assert torch.equal(after.qkv.weight[24:], expected) == columns
