"""wanda and sparsegpt make the weights zero that the papers' rules, weight by weight, do; whole models keep them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.functional.structure.sparsity import DAMPING, sparsegpt, wanda
from martlet.source import load_model
from martlet.techniques.prune.sparsegpt import SparseGPT
from martlet.techniques.prune.wanda import Wanda

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
INPUTS, OUTPUTS = 8, 3


def data() -> tuple[Tensor, Tensor]:
    """Weights (O, I), and inputs (S, I) that hang together and differ in size."""
    torch.manual_seed(0)
    x = torch.randn(40, INPUTS, dtype=torch.float64) @ torch.randn(INPUTS, INPUTS, dtype=torch.float64)
    return torch.randn(OUTPUTS, INPUTS, dtype=torch.float64), x * torch.linspace(3, 0.2, INPUTS)


def wanda_by_hand(weight: Tensor, x: Tensor, norms: bool = True) -> list[list[float]]:
    rows = weight.tolist()
    for row in rows:
        for first in range(0, INPUTS, 4):
            size = {
                i: abs(row[i]) * (sum(float(v) ** 2 for v in x[:, i]) ** 0.5 if norms else 1.0)
                for i in range(first, first + 4)
            }
            for i in sorted(size, key=size.__getitem__)[:2]:
                row[i] = 0.0
    return rows


def sparsegpt_by_hand(weight: Tensor, x: Tensor, make_up: bool = True) -> Tensor:
    """Column by column, with the inverse of what is left of x xᵀ computed anew each time."""
    work, xx = weight.clone(), x.mT @ x
    xx = xx + DAMPING * xx.diagonal().mean() * torch.eye(INPUTS, dtype=xx.dtype)
    gone = [[False] * INPUTS for _ in range(OUTPUTS)]
    for j in range(INPUTS):
        inverse = torch.linalg.inv(xx[j:, j:])
        if j % 4 == 0:
            for o in range(OUTPUTS):
                # the diagonal that column k will have when it is its turn
                cost = {k: float(work[o, k]) ** 2 / float(torch.linalg.inv(xx[k:, k:])[0, 0]) for k in range(j, j + 4)}
                for k in sorted(cost, key=cost.__getitem__)[:2]:
                    gone[o][k] = True
        for o in range(OUTPUTS):
            if gone[o][j]:
                if make_up:
                    work[o, j:] -= work[o, j] * inverse[0] / inverse[0, 0]
                work[o, j] = 0
    return work


@pytest.mark.parametrize("norms", [True, pytest.param(False, id="a fault in the oracle")])
def test_wanda_is_the_papers(norms: bool) -> None:
    weight, x = data()
    assert (wanda(weight, x.mT @ x, 2, 4).tolist() == wanda_by_hand(weight, x, norms)) == norms


@pytest.mark.parametrize("make_up", [True, pytest.param(False, id="a fault in the oracle")])
def test_sparsegpt_is_the_papers(make_up: bool) -> None:
    weight, x = data()
    found = sparsegpt(weight, x.mT @ x, 2, 4)
    assert torch.allclose(found, sparsegpt_by_hand(weight, x, make_up), rtol=1e-8, atol=1e-10) == make_up
    bare = weight.masked_fill(found == 0, 0)
    lost = [float(((each - weight) @ x.mT).square().sum()) for each in (found, bare)]
    assert lost[0] < 0.9 * lost[1]


def test_inputs_that_never_come_are_no_trouble() -> None:
    weight, x = data()
    x[:, 2] = 0
    found = sparsegpt(weight, x.mT @ x, 2, 4)
    assert found.isfinite().all()
    assert (found[:, 2] == 0).all()


class Noise:
    num_images = 6

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(3, 3, 16, 16, generator=generator)


def model(**kwargs: object) -> Model:
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY | kwargs, num_classes=5, seed=3)


@pytest.mark.parametrize("technique", [Wanda(), SparseGPT(zeros=1, of=3)])
def test_every_linear_of_a_block_has_its_zeros(technique: Wanda | SparseGPT) -> None:
    found: Any = pipeline.run(model(), Recipe((technique,)), Context(images=Noise())).module
    for block in found.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            zeros = (linear.weight.unflatten(1, (-1, technique.of)) == 0).sum(-1)
            assert (zeros == technique.zeros).all()
    assert not (found.head.weight == 0).any()


def test_no_zeros_are_the_original_to_the_bit() -> None:
    images = torch.randn(2, 3, 16, 16)
    same = pipeline.run(model(), Recipe((SparseGPT(zeros=0),)), Context(images=Noise()))
    assert torch.equal(same.module(images), model().module(images))


def test_what_groups_dont_fill_is_refused_by_name() -> None:
    odd = model(embed_dim=18)
    with pytest.raises(RecipeError, match=r"^wanda: blocks\.0\.attn\.qkv has 18 inputs, which groups of 4 don't fill"):
        pipeline.run(odd, Recipe((Wanda(),)), Context(images=Noise()))
    with pytest.raises(RecipeError, match="zeros is from 0 to less than of, not 4 of 4"):
        SparseGPT(zeros=4)
