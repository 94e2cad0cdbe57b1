"""Neighbourhoods and Kolmogorov-Arnold layers from their definitions, in float64; parameters are the authors'."""

from math import tanh

import pytest
import torch
from torch.nn.functional import layer_norm, linear
from torch.utils.flop_counter import FlopCounterMode

from martlet import models
from martlet.models.medvit_v2 import KanLayer, NeighborhoodAttention, PooledAttention, neighbors, tiles

AUTHORS = {
    "medvit_v2_tiny": 11_719_845 - 984_328,
    "medvit_v2_small": 30_087_295 - 2_750_218,
    "medvit_v2_base": 66_995_571 - 6_140_554,
    "medvit_v2_large": 118_291_477 - 10_874_378,
}
"""What their code makes, without what it never uses; 8 places of a fixed grid in each Kolmogorov-Arnold layer."""


def seen_from(place, side, kernel, dilation):
    """The `kernel` places nearest among those a multiple of `dilation` away, one by one; the lower of two as near."""
    own = [j for j in range(side) if (j - place) % dilation == 0]
    best = min(range(len(own) - kernel + 1), key=lambda i: abs(sum(own[i : i + kernel]) / kernel - place))
    return own[best : best + kernel]


@pytest.mark.parametrize(("side", "kernel", "dilation"), [(7, 3, 1), (7, 7, 1), (11, 3, 2), (15, 3, 4), (16, 5, 3)])
def test_neighbours_are_the_nearest_of_their_phase(side, kernel, dilation):
    assert neighbors(side, kernel, dilation) == [seen_from(place, side, kernel, dilation) for place in range(side)]


@pytest.mark.parametrize(("side", "kernel", "dilation"), [(12, 5, 1), (7, 3, 1), (9, 3, 2), (16, 5, 3)])
def test_tiles_hold_what_their_places_attend_to(side, kernel, dilation):
    near, attended = neighbors(side, kernel, dilation), {}
    for places, seen, distance in zip(*tiles(side, kernel, dilation), strict=True):
        for place, away in zip(places, distance, strict=True):
            pairs = [(other, d) for other, d in zip(seen, away, strict=True) if d < 2 * kernel - 1]
            attended[place] = [other for other, _ in pairs]
            assert all(other == place + (d - kernel + 1) * dilation for other, d in pairs)
    assert attended == dict(enumerate(near))


def oracle(layer, x):
    """(H, W, C) in float64, every token and its neighbours one by one."""
    h, w, c = x.shape
    q, k, v = linear(x, layer.qkv.weight.double(), layer.qkv.bias.double()).split(c, -1)
    d, out, around = c // layer.num_heads, torch.zeros_like(x), layer.kernel - 1
    for head in range(layer.num_heads):
        part = slice(head * d, (head + 1) * d)
        for i in range(h):
            for j in range(w):
                rows = seen_from(i, h, layer.kernel, layer.dilation)
                columns = seen_from(j, w, layer.kernel, layer.dilation)
                seen = [(a, b) for a in rows for b in columns]
                scores = torch.stack([q[i, j, part] @ k[a, b, part] for a, b in seen]) / d**0.5
                away = [((a - i) // layer.dilation + around, (b - j) // layer.dilation + around) for a, b in seen]
                scores = scores + torch.stack([layer.bias[head, dy, dx].double() for dy, dx in away])
                out[i, j, part] = sum(p * v[a, b, part] for p, (a, b) in zip(scores.softmax(0), seen, strict=True))
    return linear(out, layer.proj.weight.double(), layer.proj.bias.double())


@pytest.mark.parametrize("dilation", [1, 2])
def test_attention_to_the_neighbourhood(dilation):
    layer, x = NeighborhoodAttention(4, 2, kernel=3, dilation=dilation), torch.randn(1, 6, 7, 4)
    with torch.no_grad():
        layer.bias.normal_()
        expected = oracle(layer, x[0].double())
        assert torch.allclose(layer(x)[0].double(), expected, atol=1e-5)
        layer.dilation = 3 - dilation
        assert not torch.allclose(layer(x)[0].double(), expected, atol=1e-3)


def test_kan_layer_is_a_sum_of_functions_of_each_channel():
    layer, x = KanLayer(3, 2), torch.randn(3)
    with torch.no_grad():
        torch.nn.init.normal_(layer.linear.weight)
        torch.nn.init.normal_(layer.norm.weight)
        found = layer(x).double()
        normal = layer_norm(x.double(), (3,), layer.norm.weight.double(), layer.norm.bias.double())
        expected = torch.zeros(2).double()
        for out in range(2):
            for channel in range(3):
                for g in range(8):
                    value = 1 - tanh((normal[channel].item() - (-2 + 4 * g / 7)) / 0.33) ** 2
                    expected[out] += layer.linear.weight[out, 8 * channel + g].double() * value
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(layer(x.flip(0)).double(), expected, atol=1e-3)


def test_pooled_attention_of_one_token_is_attention():
    layer, x = PooledAttention(32, 1), torch.randn(2, 6, 32)
    with torch.no_grad():
        q, (k, v) = layer.q(x), layer.kv(x).chunk(2, -1)
        expected = layer.proj((q @ k.transpose(1, 2) / 32**0.5).softmax(-1) @ v)
        assert torch.allclose(layer(x), expected, atol=1e-5)
        pooled = PooledAttention(32, 3).eval()
        pooled.load_state_dict(layer.state_dict(), strict=False)
        same = x.unflatten(1, (2, 3))[:, :, :1].expand(-1, -1, 3, -1).flatten(1, 2)  # each token three times
        assert torch.allclose(pooled(same), layer(same), atol=1e-4)


@pytest.mark.parametrize("name", AUTHORS)
def test_parameters_are_those_of_the_authors_code(name):
    with torch.device("meta"):
        module = models.create(name)
    layers = sum(isinstance(part, KanLayer) for part in module.modules())
    assert sum(p.numel() for p in module.parameters()) == AUTHORS[name] - 8 * layers


def pairs_in_tiles(side, kernel):
    """Of places that stand in one tile's product, of a square."""
    places, seen, _ = tiles(side, kernel, 1)
    return (len(places) * len(places[0]) * len(seen[0])) ** 2


def test_macs_as_the_paper_counts_them():
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        module = models.create("medvit_v2_tiny").eval()
        module(torch.zeros(1, 3, 224, 224))
        near = sum(
            2 * pairs_in_tiles(56 >> int(name.split(".")[1]), part.kernel) * part.proj.in_features
            for name, part in module.named_modules()
            if isinstance(part, NeighborhoodAttention)
        )
    operations = counter.get_total_flops() - 2 * near
    assert abs(operations - 5.1e9) < 0.05e9
