"""linformer's attention is its paper's, token by token in float64; a stride of 1 gives the original logits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from martlet.core import pipeline
from martlet.core.errors import RecipeError, SourceError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.measure.macs import macs_run
from martlet.source import load_model
from martlet.techniques.low_rank.linformer import Linformer, cells
from martlet.vit.token_run import Patches

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
MODELS = {
    "class token": TINY,
    "no class token": TINY | {"class_token": False, "global_pool": "avg"},
    "registers and qk-norm": TINY | {"reg_tokens": 2, "qk_norm": True, "qkv_bias": False},
}


def model(name: str = "class token", **more: Any) -> Model:
    found = load_model("timm:vit_tiny_patch16_224", model_kwargs=MODELS[name] | more, num_classes=5, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return found


def apply(given: Model, **settings: Any) -> Model:
    return pipeline.run(given, Recipe((Linformer(**settings),)), Context())


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", MODELS)
def test_a_stride_of_one_gives_the_original_logits(name: str) -> None:
    given = model(name)
    with torch.no_grad():
        expected = given.module(IMAGES)
        torch.testing.assert_close(apply(given, stride=1).module(IMAGES), expected, rtol=1e-4, atol=1e-4)
        assert float((apply(given, stride=2).module(IMAGES) - expected).abs().max()) > 1e-3


def by_hand(x: Tensor, attention: Any, counted: bool = True) -> np.ndarray:
    """softmax(q (E k)ᵀ / √d + bias) (F v), a token and a head at a time; as a fault, every sum counts as one key."""
    heads, n, dim = 3, x.shape[0], 12
    w, b = attention.qkv.weight.double().numpy(), attention.qkv.bias.double().numpy()
    q, k, v = np.split(x.double().numpy() @ w.T + b, 3, 1)
    e, f, bias = (each.double().numpy() for each in (attention.slots.key, attention.slots.value, attention.slots.bias))
    out = np.zeros((n, dim))
    for h in range(heads):
        part = slice(4 * h, 4 * h + 4)
        keys = [sum(e[i, j] * k[j, part] for j in range(n)) for i in range(len(bias))]
        values = [sum(f[i, j] * v[j, part] for j in range(n)) for i in range(len(bias))]
        for t in range(n):
            scores = [q[t, part] @ key / 2 + (extra if counted else 0) for key, extra in zip(keys, bias, strict=True)]
            weights = [math.exp(s - max(scores)) for s in scores]
            out[t, part] = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    return out @ attention.proj.weight.double().numpy().T + attention.proj.bias.double().numpy()


@torch.no_grad()
def test_attention_is_the_papers() -> None:
    attention: Any = apply(model()).module.blocks[0].attn  # type: ignore[index, union-attr]
    generator = torch.Generator().manual_seed(6)
    for weights in (attention.slots.key, attention.slots.value):
        weights.add_(0.1 * torch.randn(weights.shape, generator=generator))
    x = torch.randn(1, 17, 12, generator=generator)
    found = attention(x)[0].numpy()
    np.testing.assert_allclose(found, by_hand(x[0], attention), rtol=1e-4, atol=1e-5)
    assert np.abs(found - by_hand(x[0], attention, counted=False)).max() > 1e-2


def test_sums_begin_as_means_over_cells() -> None:
    slots: Any = apply(model()).module.blocks[1].attn.slots  # type: ignore[index, union-attr]
    rows = slots.key.detach()
    assert rows.shape == (5, 17)
    assert rows[0].nonzero().flatten().tolist() == [0]
    assert [row.nonzero().flatten().tolist() for row in rows[1:3]] == [[1, 2, 5, 6], [3, 4, 7, 8]]
    torch.testing.assert_close(rows.sum(1), torch.ones(5))
    torch.testing.assert_close(slots.bias.detach(), torch.tensor([0.0] + [math.log(4)] * 4))
    assert cells(Patches(1, 6, None), 2).tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert cells(Patches(0, 9, (3, 3)), 2).tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 3]


def test_many_tokens_cost_less() -> None:
    given = model(patch_size=2)
    before, after = (macs_run(each.module.to("meta"), (32, 32)) for each in (given.copy(), apply(given, stride=4)))
    assert after < 0.8 * before


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^linformer: stride 4 makes all 16 patches at blocks\.0 one cell"):
        apply(model(), stride=4)
    with pytest.raises(RecipeError, match="stride is 1 or more patches, not 0"):
        Linformer(stride=0)
    swin = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}
    with pytest.raises(SourceError, match=r"^linformer: attention at layers\.0.* is inside windows"):
        apply(load_model("timm:swin_tiny_patch4_window7_224", model_kwargs=swin, num_classes=5))
    with pytest.raises(RecipeError, match=r"^passes\[1\] magnitude requires 'all_tokens', which passes\[0\] linformer"):
        Recipe.load("linformer | magnitude").facts()
