"""The merger cell by cell, in float64; fuzzy in training, exact otherwise; any image to as many tokens."""

import pytest
import torch
from families import FAMILIES, images, tiny
from torch.nn.functional import interpolate, layer_norm, linear

from martlet import models
from martlet.models.vitar import FuzzyPosition, TokenMerger, cells


def normal(x, norm):
    return layer_norm(x, x.shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps)


def merged(layer, tokens):
    """One cell's (N, C) -> (C,), by the paper's equations."""
    mean = tokens.mean(0)
    q = linear(normal(mean, layer.norm1), layer.q.weight.double(), layer.q.bias.double())
    k, v = linear(normal(tokens, layer.norm1), layer.kv.weight.double(), layer.kv.bias.double()).chunk(2, -1)
    d, seen = len(q) // layer.num_heads, torch.zeros_like(q)
    for head in range(layer.num_heads):
        part = slice(head * d, (head + 1) * d)
        seen[part] = (k[:, part] @ q[part] / d**0.5).softmax(0) @ v[:, part]
    x = mean + linear(seen, layer.proj.weight.double(), layer.proj.bias.double())
    hidden = linear(normal(x, layer.norm2), layer.mlp.fc1.weight.double(), layer.mlp.fc1.bias.double())
    return x + linear(torch.nn.functional.gelu(hidden), layer.mlp.fc2.weight.double(), layer.mlp.fc2.bias.double())


def oracle(layer, x):
    """(H, W, C) in float64, halved again and again."""
    while True:
        (h, w), grid = x.shape[:2], layer.grid
        to = [max(grid[0], (h + 1) // 2), max(grid[1], (w + 1) // 2)]
        rows, columns = ([i * side // n for i in range(n + 1)] for side, n in zip((h, w), to, strict=True))
        out = torch.zeros(*to, x.shape[2], dtype=torch.float64)
        for i in range(to[0]):
            for j in range(to[1]):
                out[i, j] = merged(layer, x[rows[i] : rows[i + 1], columns[j] : columns[j + 1]].flatten(0, 1))
        x = out
        if tuple(to) == grid:
            return x


@pytest.mark.parametrize("size", [(2, 3), (4, 6), (3, 5), (13, 9)])
def test_cells_are_merged_until_the_grid_is_reached(size):
    layer, x = TokenMerger(8, 2, (2, 3), 2.0, 0.0), torch.randn(2, *size, 8)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        found = layer(x).double()
        for image in range(2):
            assert torch.allclose(found[image], oracle(layer, x[image].double()), atol=1e-5)
        assert not torch.allclose(found[0], oracle(layer, x[0].flip(0).double()), atol=1e-3)


@pytest.mark.parametrize(("side", "count"), [(4, 4), (8, 4), (5, 4), (7, 4)])
def test_every_token_is_in_one_cell(side, count):
    found = cells(side, count)
    assert found[found >= 0].tolist() == list(range(side))
    assert found.shape[1] <= 2


def test_positions_are_fuzzy_in_training_alone():
    layer, x = FuzzyPosition(4, (3, 3)), torch.zeros(1, 4, 5, 6)
    with torch.no_grad():
        layer.embedding.normal_()
        layer.eval()
        exact = layer(x)
        assert torch.equal(exact, layer(x))
        assert torch.allclose(exact, interpolate(layer.embedding, (5, 6), mode="bilinear"))
        assert torch.allclose(exact, layer.sample(torch.zeros(5, 6, 2)), atol=1e-6)
        down = torch.zeros(5, 6, 2)
        down[..., 0] = 1  # one token further along H
        assert torch.allclose(layer.sample(down)[:, :, :-1], exact[:, :, 1:], atol=1e-6)
        layer.train()
        assert not torch.equal(layer(x), layer(x))
        samples = torch.stack([layer(x) for _ in range(3000)])
        half = FuzzyPosition(4, (3, 3))
        half.embedding.copy_(layer.embedding)
        steps = (torch.arange(8) + 0.5) / 8 - 0.5
        offsets = [torch.tensor([a, b]).expand(5, 6, 2) for a in steps for b in steps]
        expected = torch.stack([half.sample(one) for one in offsets]).mean(0)
        assert (samples.mean(0) - expected).abs().max() < 0.1


def test_any_image_becomes_as_many_tokens():
    module = tiny("vitar_small_patch16_224")
    grid = FAMILIES["vitar_small_patch16_224"].tiny["grid"]
    with torch.no_grad():
        for size in ((16, 16), (32, 32), (64, 128), (128, 128), (20, 44)):
            assert module.forward_features(images(size, 1)).shape[2:] == (grid, grid)


def test_parameters_are_those_of_deit_s_and_one_more_block():
    with torch.device("meta"):
        small = models.create("vitar_small_patch16_224")
    params = sum(p.numel() for p in small.parameters())
    merger = sum(p.numel() for p in small.stages[0].merger.parameters())
    assert params - merger == 22_050_664 - 384 - 384  # DeiT-S, without class token and its place
    assert merger == 12 * 384**2 + 13 * 384
