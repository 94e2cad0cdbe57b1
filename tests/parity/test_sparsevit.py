"""sparsevit is the paper's, in whole models, on an oracle that computes one token of one window at a time."""

import math
from collections.abc import Mapping

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.preprocess import Preprocess
from martlet.techniques.tokens.sparsevit import SparseViT

Grid = dict[tuple[int, int], Tensor]
"""Tokens (C,) by their place."""
SIZE, WINDOW = (48, 40), 5


def swin() -> SwinTransformer:
    """Grids 12 x 10 and 6 x 5, which windows of 5 don't fill, shifted in one stage in one direction only."""
    torch.manual_seed(2)
    sizes = {"patch_size": 4, "embed_dim": 8, "depths": (3, 2), "num_heads": (1, 2), "num_classes": 7}
    module = SwinTransformer(img_size=SIZE, window_size=WINDOW, **sizes).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def logits_with(module: SwinTransformer, technique: SparseViT) -> Tensor:
    model = Model(name="swin", module=module, preprocess=Preprocess(size=SIZE), num_classes=7, origin={})
    float32 = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of the noise that the model is checked with
    try:
        done = pipeline.run(model, Recipe((technique,)), Context())
    finally:
        torch.set_default_dtype(float32)
    with torch.no_grad():
        return done.module(images())


def logits_by_hand(
    module: SwinTransformer, ratios: Mapping[int, float], power: int = 2, once: bool = True, best: bool = True
) -> Tensor:
    """power: of the norm. once: windows are ranked once a stage. best: those of the greatest norm are computed."""
    out = []
    with torch.no_grad():
        for image in images():
            x, number = module.patch_embed(image[None]), 0
            for stage in module.layers:
                x, first = stage.downsample(x), None
                for block in stage.blocks:
                    grid = {(i, j): x[0, i, j] for i in range(x.shape[1]) for j in range(x.shape[2])}
                    if ratios.get(number):
                        first = grid if first is None or not once else first
                        sign = 1 if best else -1
                        windows = through(block, grid, x.shape[1:3], ratios[number], first, power, sign)
                        x = torch.stack(
                            [torch.stack([windows[i, j] for j in range(x.shape[2])]) for i in range(x.shape[1])]
                        )
                        x = x[None]
                    else:
                        x = block(x)
                    number += 1
            out.append(module.head(module.norm(x))[0])
    return torch.stack(out)


def through(
    block: SwinTransformerBlock, grid: Grid, shape: tuple[int, int], ratio: float, ranked: Grid, power: int, sign: int
) -> Grid:
    windows: dict[tuple[int, int], list[tuple[int, int]]] = {}
    height, width = shape
    size, (down, across) = block.window_size, block.shift_size
    full = [math.ceil(side / w) * w for side, w in zip(shape, size, strict=True)]
    for i in range(full[0]):  # places after the shift; those past the grid are padding
        for j in range(full[1]):
            windows.setdefault((i // size[0], j // size[1]), []).append((i, j))

    def source(place: tuple[int, int]) -> tuple[int, int] | None:
        i, j = place
        return ((i + down) % height, (j + across) % width) if i < height and j < width else None

    def region(place: tuple[int, int]) -> tuple[int, ...]:
        """Which of the parts that the shift brought together, by direction."""
        return tuple(
            (p >= n - w) + (p >= n - s) if s else 0
            for p, n, w, s in zip(place, full, size, (down, across), strict=True)
        )

    def norm(places: list[tuple[int, int]]) -> float:
        values = [ranked[at] for at in map(source, places) if at is not None]
        return sum(float((value.abs() ** power).sum()) for value in values) ** (1 / power)

    done = dict(grid)
    order = sorted(windows, key=lambda window: -sign * norm(windows[window]))
    for window in order[: math.ceil(len(windows) * (1 - ratio) - 1e-9)]:
        places = windows[window]
        normed = [torch.zeros_like(grid[0, 0]) if at is None else block.norm1(grid[at]) for at in map(source, places)]
        heads = block.attn.num_heads
        q, k, v = zip(*(block.attn.qkv(x).reshape(3, heads, -1) for x in normed), strict=True)
        bias = block.attn._get_rel_pos_bias()[0]
        for a, place in enumerate(places):
            at = source(place)
            if at is None:
                continue
            parts = []
            for h in range(heads):
                scores = []
                for b, other in enumerate(places):
                    score = float(q[a][h] @ k[b][h]) / math.sqrt(q[a].shape[-1]) + float(bias[h, a, b])
                    scores.append(score if region(place) == region(other) else score - 100)
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                parts.append(sum(w * v[b][h] for b, w in enumerate(weights)))
            x = grid[at] + block.attn.proj(torch.cat(parts))  # type: ignore[arg-type]
            done[at] = x + block.mlp(block.norm2(x))
    return done


RATIOS = {1: 0.5, 2: 0.7, 3: 0.4}


def test_sparsevit_is_the_papers() -> None:
    module = swin()
    found = logits_with(module, SparseViT(ratio=RATIOS))
    torch.testing.assert_close(found, logits_by_hand(module, RATIOS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("ratios", "wrong"),
    [
        (RATIOS | {1: 0.8}, {}),
        (RATIOS, {"power": 1}),
        (RATIOS, {"once": False}),
        (RATIOS, {"best": False}),
    ],
)
def test_this_can_fail(ratios: Mapping[int, float], wrong: dict[str, bool]) -> None:
    module = swin()
    found = logits_with(module, SparseViT(ratio=RATIOS))
    assert not torch.allclose(found, logits_by_hand(module, ratios, **wrong), rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
