"""minivit's attention mixes heads as its paper's does; blocks of a group have one set of weights, stored once."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from martlet.core import pipeline, store
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.engine.torch import Torch
from martlet.measure.size import params, weight_bytes
from martlet.source import load_model
from martlet.techniques.distill.distill import Distill
from martlet.techniques.share.minivit import MiniViT
from martlet.vit.view import view

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 3}
IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1


def model(**more: Any) -> Model:
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY | more, num_classes=5, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return found


def apply(given: Model, *techniques: Any) -> Model:
    class Pictures:
        num_images = len(IMAGES)

        def __iter__(self) -> Any:
            yield IMAGES

    return pipeline.run(given, Recipe(techniques), Context(images=Pictures()))


def by_hand(x: Tensor, attention: Any, after: bool = True) -> np.ndarray:
    """W softmax(L q kᵀ / √d) v, a head and a token at a time; as a fault, heads aren't mixed after the softmax."""
    heads, n, dim = 3, x.shape[0], 12
    w, b = attention.qkv.weight.double().numpy(), attention.qkv.bias.double().numpy()
    q, k, v = np.split(x.double().numpy() @ w.T + b, 3, 1)
    first, second = (each.double().numpy() for each in attention.mix)
    part = [slice(4 * h, 4 * h + 4) for h in range(heads)]
    scores = [[[q[i, p] @ k[j, p] / 2 for j in range(n)] for i in range(n)] for p in part]
    out = np.zeros((n, dim))
    shares = np.zeros((heads, n, n))
    for g in range(heads):
        for i in range(n):
            mixed = [sum(first[g, h] * scores[h][i][j] for h in range(heads)) for j in range(n)]
            e = [math.exp(s - max(mixed)) for s in mixed]
            shares[g, i] = [s / sum(e) for s in e]
    for g in range(heads):
        rows = sum(second[g, h] * shares[h] for h in range(heads)) if after else shares[g]
        out[:, part[g]] = rows @ v[:, part[g]]
    return out @ attention.proj.weight.double().numpy().T + attention.proj.bias.double().numpy()


@torch.no_grad()
def test_heads_are_mixed_as_in_the_paper() -> None:
    attention: Any = apply(model(), MiniViT()).module.blocks[1].attn  # type: ignore[index, union-attr]
    generator = torch.Generator().manual_seed(6)
    for mix in attention.mix:
        mix.add_(0.3 * torch.randn(3, 3, generator=generator))
    x = torch.randn(1, 5, 12, generator=generator)
    found = attention(x)[0].numpy()
    np.testing.assert_allclose(found, by_hand(x[0], attention), rtol=1e-4, atol=1e-5)
    assert np.abs(found - by_hand(x[0], attention, after=False)).max() > 1e-2


@torch.no_grad()
def test_a_share_of_one_and_equal_blocks_give_the_original_logits() -> None:
    given = model()
    assert torch.equal(apply(given, MiniViT(share=1)).module(IMAGES), given.module(IMAGES))
    blocks: Any = given.module.blocks
    for i in (1, 3):
        blocks[i].attn.load_state_dict(blocks[i - 1].attn.state_dict())
        blocks[i].mlp.load_state_dict(blocks[i - 1].mlp.state_dict())
    done = apply(given, MiniViT(share=2))  # norms still differ
    torch.testing.assert_close(done.module(IMAGES), given.module(IMAGES), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(apply(model(), MiniViT(share=2)).module(IMAGES), model().module(IMAGES), atol=1e-2)


@pytest.mark.parametrize(("share", "sets"), [(2, 2), (3, 2), (0, 1)])
def test_weights_are_stored_once_through_copies_training_and_files(share: int, sets: int, tmp_path: Any) -> None:
    given = model(qkv_bias=False, init_values=0.5)
    block = 12 * 36 + 36 + 12 * 12 + 12 + 2 * 12 * 48 + 48 + 12  # with the biases that qkv gets
    own = 4 * (2 * 24 + 2 * 12) + (3 if share == 3 else 4) * 2 * 9  # norms and scales, mixtures where blocks share
    alone = 36 if share == 3 else 0  # the fourth block is as it was, without the biases of qkv
    others = sum(p.numel() for n, p in given.module.named_parameters() if not n.startswith("blocks."))
    done = apply(given, MiniViT(share=share), Distill(epochs=2.0, batch=8, relations=1.0))
    assert params(done.module) == sets * block - alone + own + others
    assert params(done.copy().module) == params(done.module)
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, done, "torch", store.write_model(folder, done, Torch()))
    size = (tmp_path / "out" / store.WEIGHTS).stat().st_size
    assert weight_bytes(done.module) <= size <= weight_bytes(done.module) + 20000  # the header
    again = store.load(tmp_path / "out").model()
    assert params(again.module) == params(done.module)
    assert torch.equal(again.module(IMAGES), done.module(IMAGES))
    first, second = (each.attention.proj.module for each in view(again.module).blocks[:2])
    assert first is not second
    assert first.weight is second.weight
    mixes: Any = [block.attn.mix[0] for block in done.module.blocks[:2]]  # type: ignore[union-attr]
    assert not torch.equal(*mixes)  # each block has learned its own


def test_without_mixtures_a_block_has_its_norms_alone() -> None:
    given = model()
    done = apply(given, MiniViT(mixed=False))
    mixed = apply(given, MiniViT())
    assert params(mixed.module) - params(done.module) == 4 * 2 * 9
    with torch.no_grad():  # mixtures begin as the identity
        torch.testing.assert_close(done.module(IMAGES), mixed.module(IMAGES), rtol=1e-4, atol=1e-4)


def test_what_cannot_share_is_named() -> None:
    uneven = model()
    uneven.module.blocks[1].mlp = type(uneven.module.blocks[1].mlp)(12, 24)  # type: ignore[index, union-attr]
    with pytest.raises(RecipeError, match=r"^minivit: blocks\.1 can't have the weights of blocks\.0, which has other"):
        apply(uneven, MiniViT())
    with pytest.raises(
        RecipeError, match=r"^passes\[1\] svd requires 'whole_linears', which passes\[0\] minivit breaks"
    ):
        Recipe.load("minivit | svd").facts()
    with pytest.raises(RecipeError, match="share is how many blocks have the same weights, or 0 for all, not -1"):
        MiniViT(share=-1)
