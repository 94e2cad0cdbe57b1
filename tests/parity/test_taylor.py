"""taylor cuts the units whose weights times gradients, one by one, are the smallest."""

from typing import Any

import pytest
import torch

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.source import load_model
from martlet.techniques.prune.taylor import Taylor

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "mlp_ratio": 2.0}
UNITS, DIM = 24, 4


class Noise:
    num_images = 6

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(3, 3, 16, 16, generator=generator)


def model() -> Model:
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=5, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.normal_(0, 0.5)
    return found


def products(absolute: bool) -> dict[str, torch.Tensor]:
    """By parameter, the sum over batches of |g w|, or of g w as a fault, of the cross entropy with the own class."""
    module, found = model().module.double(), dict[str, torch.Tensor]()
    for images in Noise():
        module.zero_grad()
        logits = module(images.double())
        loss: Any = -sum(logits[i].log_softmax(0)[int(logits[i].argmax())] for i in range(len(logits))) / len(logits)
        loss.backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            value = (parameter * parameter.grad).detach()
            found[name] = found.get(name, 0) + (value.abs() if absolute else value)
    return found


def kept_units(left: int, absolute: bool) -> list[int]:
    by_name = products(absolute)
    scores = []
    for unit in range(UNITS):
        score = float(by_name["blocks.0.mlp.fc1.bias"][unit])
        for feature in range(12):
            score += float(by_name["blocks.0.mlp.fc1.weight"][unit, feature])
            score += float(by_name["blocks.0.mlp.fc2.weight"][feature, unit])
        scores.append(score)
    return sorted(sorted(range(UNITS), key=scores.__getitem__)[UNITS - left :])


def kept_rows(left: int, absolute: bool) -> list[int]:
    """Rows of q in qkv, of each head those dimensions of q and k that stay."""
    by_name, rows = products(absolute), list[int]()
    for head in range(3):
        scores = []
        for d in range(DIM):
            score = 0.0
            for first in (0, 12):
                row = first + head * DIM + d
                score += float(by_name["blocks.0.attn.qkv.bias"][row])
                score += sum(float(value) for value in by_name["blocks.0.attn.qkv.weight"][row])
            scores.append(score)
        rows += [head * DIM + d for d in sorted(sorted(range(DIM), key=scores.__getitem__)[DIM - left :])]
    return rows


def pruned(group: str) -> torch.nn.Module:
    technique = Taylor(prune_ratio=0.05, groups=(group,), multiple=2, repair=False)
    return pipeline.run(model(), Recipe((technique,)), Context(images=Noise())).module


@pytest.mark.parametrize("absolute", [True, pytest.param(False, id="a fault in the oracle")])
def test_hidden_units_are_those_of_the_largest_products(absolute: bool) -> None:
    after, before = pruned("hidden").blocks[0].mlp, model().module.blocks[0].mlp  # type: ignore[index, union-attr]
    kept = kept_units(after.fc1.out_features, absolute)
    assert len(kept) < UNITS
    assert torch.equal(after.fc2.weight, before.fc2.weight[:, kept]) == absolute


@pytest.mark.parametrize("absolute", [True, pytest.param(False, id="a fault in the oracle")])
def test_dimensions_of_queries_are_those_of_the_largest_products(absolute: bool) -> None:
    after, before = pruned("qk").blocks[0].attn, model().module.blocks[0].attn  # type: ignore[index, union-attr]
    assert after.qk_dim == 2
    kept = kept_rows(2, absolute)
    assert torch.equal(after.qkv.weight[:6], before.qkv.weight[kept]) == absolute
