"""Two of four: what is made zero stays zero through training and rounding, and takes the bits that the paper counts."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.functional.structure.sparsity import pattern_of, smallest, stored_bits
from martlet.nn.quantizers import PackedWeightQuantizer
from martlet.source import load_model
from martlet.techniques.distill.distill import Distill
from martlet.techniques.prune.sparsegpt import SparseGPT
from martlet.techniques.prune.wanda import Wanda

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
MAPS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class Pictures:
    num_images = 8

    def __iter__(self) -> Iterator[Tensor]:
        yield 2 * torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(5)) - 1


def apply(*techniques: Any) -> Model:
    model = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=5, seed=3)
    return pipeline.run(model, Recipe(techniques), Context(images=Pictures()))


def zeros_by_hand(rows: Tensor, of: int, run: int) -> list[int]:
    """By group of a row, how many runs of zeros there are."""
    found = []
    for row in rows.tolist():
        for first in range(0, len(row), of):
            runs = [row[i : i + run] for i in range(first, first + of, run)]
            found.append(sum(not any(each) for each in runs))
    return found


@pytest.mark.parametrize(("zeros", "of", "run"), [(2, 4, 1), (4, 8, 2)])
def test_zeros_stay_zero_in_training_and_others_move(zeros: int, of: int, run: int) -> None:
    sparse = SparseGPT(zeros=zeros, of=of, run=run)
    before, after = apply(sparse), apply(sparse, Distill(epochs=3.0, batch=8, rate=1e-2))
    for block in ("blocks.0", "blocks.1"):
        for name in MAPS:
            old, new = (each.module.get_submodule(f"{block}.{name}").weight.detach() for each in (before, after))
            assert set(zeros_by_hand(new, of, run)) == {zeros // run}
            assert torch.equal(old == 0, new == 0)
            assert not torch.allclose(old, new)
    free = apply(Distill(epochs=1.0, batch=8, rate=1e-2))  # what no technique has made zero may move
    assert not any((p == 0).any() for n, p in free.module.named_parameters() if n.endswith("qkv.weight"))


def test_zeros_stay_zero_under_rounding_that_is_trained() -> None:
    recipe = Recipe.load("gpusq-vit")
    short = {"epochs": 3.0, "batch": 8, "rate": 1e-2}
    trained = Recipe(tuple(replace(t, **short) if hasattr(t, "epochs") else t for t in recipe.passes))  # type: ignore[type-var]
    done = apply(*trained.passes)
    pairs = [each for each in done.module.named_modules() if isinstance(each[1], PackedWeightQuantizer)]
    inside = [(name, each) for name, each in pairs if "blocks" in name]
    assert len(inside) == 8
    for _, quantizer in inside:
        assert min(zeros_by_hand(quantizer(), 8, 2)) >= 2


def test_of_more_zeros_than_the_pattern_has_the_smallest_are_of_it() -> None:
    sizes = torch.tensor([[0.1, 0.4, 0.2, 0.9, 0.5, 0.6, 0.7, 0.8]])
    is_zero = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0]], dtype=torch.bool)
    found = pattern_of(is_zero, sizes, 2, 4)
    assert found is not None
    assert found.tolist() == [[True, False, True, False, False, True, True, False]]
    assert pattern_of(is_zero, sizes, 3, 4) is None
    pairs = pattern_of(torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]], dtype=torch.bool), sizes, 4, 8, 2)
    assert pairs is not None
    assert pairs.tolist() == [[True, True, False, False, False, False, True, True]]
    scores = torch.tensor([[1.0, 9.0, 2.0, 3.0, 4.0, 4.0, 8.0, 8.0]])
    assert smallest(scores, 4, 8, 2).tolist() == [[False, False, True, True, True, True, False, False]]


def test_weights_take_the_bits_that_the_paper_counts() -> None:
    assert 32 / stored_bits(8, 2, 4) == pytest.approx(6.4)
    assert 32 / stored_bits(4, 4, 8, 2) == pytest.approx(12.7, rel=0.05)
    kept = [(value, place) for place, value in enumerate([0, 3, 0, -7]) if value]  # by hand: two codes, two places
    assert stored_bits(8, 2, 4) * 4 == sum(8 + 2 for _ in kept)
    assert 32 / stored_bits(8, 2, 4) != pytest.approx(8.0, rel=0.05)  # as if places took nothing


def test_sizes_that_groups_do_not_fill_are_named() -> None:
    odd = TINY | {"embed_dim": 18}
    model = load_model("timm:vit_tiny_patch16_224", model_kwargs=odd, num_classes=5, seed=3)
    with pytest.raises(RecipeError, match=r"^wanda: blocks\.0\.attn\.qkv has 18 inputs, which groups of 4 don't fill"):
        pipeline.run(model, Recipe((Wanda(),)), Context(images=Pictures()))
    with pytest.raises(RecipeError, match="run has to divide zeros and of, and 2 doesn't"):
        SparseGPT(zeros=1, of=4, run=2)
