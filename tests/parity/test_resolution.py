"""resolution against a slow resampling of positions in plain Python, in every library; and what runs after it."""

import math
from typing import Any

import pytest
import torch
from PIL import Image

from martlet.core import pipeline
from martlet.core.errors import RecipeError, SourceError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.recipe_search.screen import Held
from martlet.source import load_model
from martlet.techniques.tokens.resolution import Resolution

TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
CUBIC = -0.5
"""The free parameter of Keys's kernel, with which images are resized."""


def kernel(x: float) -> float:
    """Keys, Cubic Convolution Interpolation for Digital Image Processing, 1981, equation 4 for a = CUBIC."""
    x = abs(x)
    if x < 1:
        return (CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1
    return CUBIC * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def weights(old: int, new: int, antialias: bool = True) -> list[list[float]]:
    """Of each new place, what each old one counts: a kernel as wide as a new pixel, summing to one inside the grid."""
    scale = old / new
    wide = max(scale, 1.0) if antialias else 1.0
    rows = []
    for i in range(new):
        centre = (i + 0.5) * scale
        row = [kernel((j + 0.5 - centre) / wide) for j in range(old)]
        rows.append([w / sum(row) for w in row])
    return rows


def resampled(positions: torch.Tensor, prefix: int, old: int, new: int, antialias: bool = True) -> torch.Tensor:
    """(N, C) for a square grid, the first `prefix` as they are."""
    table, grid = weights(old, new, antialias), positions.double().tolist()
    rows = grid[:prefix]
    for y in range(new):
        for x in range(new):
            rows.append(
                [
                    math.fsum(
                        table[y][j] * table[x][i] * grid[prefix + j * old + i][c]
                        for j in range(old)
                        for i in range(old)
                    )
                    for c in range(positions.shape[1])
                ]
            )
    return torch.tensor(rows)


def vit(**more):
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY | more, num_classes=5)


@pytest.mark.parametrize(("more", "prefix"), [({}, 1), ({"reg_tokens": 2, "no_embed_class": True}, 0)])
def test_positions_are_resampled_and_all_else_stays(more, prefix):
    model = vit(**more)
    small = pipeline.run(model, Recipe((Resolution(size=48),)), Context())
    before, after = model.module.state_dict(), small.module.state_dict()
    expected = resampled(before.pop("pos_embed")[0], prefix, 8, 6)
    found = after.pop("pos_embed")[0].double()
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_this_can_fail():
    positions = vit().module.state_dict()["pos_embed"][0]
    right, blurred = (resampled(positions, 1, 8, 6, antialias) for antialias in (True, False))
    assert (right - blurred).abs().max() > 1e-2 * right.abs().max()
    assert not torch.allclose(right, resampled(positions.flip(0), 1, 8, 6))


def test_the_preprocessing_keeps_its_share_of_the_image_and_later_passes_get_such_images():
    model = vit()
    seen = []

    class Images(Held):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append(batch.shape)
                yield batch

    images = Images([torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))])
    small = pipeline.run(model, Recipe.load("resolution | int8"), Context(images=images))  # 64 less 14 %, in 32s
    assert small.preprocess.size == (64, 64)
    small = pipeline.run(model, Recipe((Resolution(size=48), *Recipe.load("int8").passes)), Context(images=images))
    assert small.preprocess.size == (48, 48)
    assert isinstance(model.preprocess.resize, int)
    assert small.preprocess.resize == model.preprocess.resize * 48 // 64
    assert small.module(torch.zeros(1, 3, 48, 48)).shape == (1, 5)
    assert seen
    photo = Image.effect_noise((90, 70), 50).convert("RGB")
    assert small.preprocess(photo).shape == (3, 48, 48)
    assert model.preprocess.size == (64, 64)


@pytest.mark.parametrize("spec", ["torchvision:vit_b_16", "hf:vit"])
def test_other_libraries_positions(spec, tmp_path):
    if spec.startswith("hf"):
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48, image_size=64,
            patch_size=8, num_labels=5,
        )  # fmt: skip
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
        transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
        model, name = load_model(f"hf:{tmp_path}"), "position_embeddings"
    else:
        small: dict[str, Any] = {
            "image_size": 64,
            "patch_size": 8,
            "num_layers": 1,
            "num_heads": 3,
            "hidden_dim": 24,
            "mlp_dim": 48,
        }
        from torchvision.models import VisionTransformer

        model, name = load_model("torchvision:vit_b_16"), "pos_embedding"
        model.module = VisionTransformer(**small, num_classes=1000).eval()
        model.preprocess = model.preprocess.override({"size": 64})
    found = pipeline.run(model, Recipe((Resolution(size=48),)), Context())
    [before], [after] = (
        [value for key, value in m.module.state_dict().items() if key.endswith(name)] for m in (model, found)
    )
    expected = resampled(before[0], 1, 8, 6)
    assert (after[0].double() - expected).abs().max() < 1e-6 * expected.abs().max()
    assert found.module(torch.zeros(2, 3, 48, 48)).shape == (2, model.num_classes)


def test_bad_input():
    model = vit()
    with pytest.raises(RecipeError, match="takes images of 64 × 64 pixels, and 96 × 96 isn't less; give a smaller"):
        Resolution(size=96).check(model)
    with pytest.raises(SourceError, match="can't take images of 52 × 52 pixels: "):
        pipeline.run(model, Recipe((Resolution(size=52),)), Context())
    with pytest.raises(RecipeError, match="size is pixels of a side, not -1"):
        Resolution(size=-1)
    with pytest.raises(RecipeError, match="ratio is the share to remove"):
        Resolution(ratio=1.0)
    with pytest.raises(RecipeError, match="move resolution before it"):
        Recipe.load("tome | resolution").facts()
