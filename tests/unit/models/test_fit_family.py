"""Groups and latents are full attention in which most pairs are masked; its cost grows with the power 4/3."""

import pytest
import torch
from torch.nn.functional import layer_norm, linear
from torch.utils.flop_counter import FlopCounterMode

from martlet import models
from martlet.models.fit import Interleaved

DIMS = {"group": 2, "latents": 2, "local": (1, 2), "globally": (2,), "num_heads": 2, "latent_heads": 2}


def normal(x, norm):
    return layer_norm(x, x.shape[1:], norm.weight.double(), norm.bias.double(), norm.eps)


def attend(q, k, v, mask, heads):
    """(N, C), (M, C), (M, C): each asks where its row of the mask (N, M) is true."""
    out, d = torch.zeros(len(q), v.shape[1], dtype=torch.float64), q.shape[1] // heads
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        for i in range(len(q)):
            seen = mask[i].nonzero().flatten()
            out[i, part] = ((k[seen, part] @ q[i, part]) / d**0.5).softmax(0) @ v[seen, part]
    return out


def layers(blocks, x, mask):
    for block in blocks:
        mixer = block.mixer
        q, k, v = linear(normal(x, block.norm1), mixer.qkv.weight.double(), mixer.qkv.bias.double()).chunk(3, -1)
        out = attend(q, k, v, mask, mixer.num_heads)
        x = x + linear(out, mixer.proj.weight.double(), mixer.proj.bias.double())
        x = x + block.mlp.double()(normal(x, block.norm2))
        block.mlp.float()
    return x


def cross(layer, x, read, mask):
    q = linear(normal(x, layer.norm), layer.q.weight.double(), layer.q.bias.double())
    k, v = linear(normal(read, layer.read_norm), layer.kv.weight.double(), layer.kv.bias.double()).chunk(2, -1)
    return x + linear(attend(q, k, v, mask, layer.num_heads), layer.proj.weight.double(), layer.proj.bias.double())


def oracle(layer, x, talk=True):
    """(C, H, W) -> the same, in float64: one sequence of tokens, one of latents."""
    _, h, w = x.shape
    g = layer.group[0]
    own = torch.tensor([i // g * (w // g) + j // g for i in range(h) for j in range(w)])  # group of each token
    tokens = x.flatten(1).T + layer.position.double().repeat(h // g, w // g, 1).flatten(0, 1)
    latents = layer.latents[:, 0].double()
    of = torch.arange(len(latents)) // (len(latents) // layer.groups)  # group of each latent
    everyone = torch.ones(len(latents), len(latents), dtype=torch.bool)
    tokens = layers(layer.local[0], tokens, own[:, None] == own)
    for i in range(len(layer.read)):
        latents = cross(layer.read[i], latents, tokens, of[:, None] == own)
        latents = layers(layer.globally[i], latents, everyone if talk else of[:, None] == of)
        tokens = cross(layer.write[i], tokens, latents, own[:, None] == of)
        tokens = layers(layer.local[i + 1], tokens, own[:, None] == own)
    return tokens.T.unflatten(1, (h, w))


def test_layers_are_masked_full_attention():
    layer = Interleaved(8, 4, (4, 6), mlp_ratio=2.0, drop_path_rate=0.0, **DIMS)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 8, 4, 6)
    with torch.no_grad():
        found = layer(x).double()
        for image in range(2):
            assert torch.allclose(found[image], oracle(layer, x[image].double()), atol=1e-4)
        assert not torch.allclose(found[0], oracle(layer, x[0].double(), talk=False), atol=1e-2)


def attention_macs(side, group):
    """Products of two activations, of images of side² tokens."""
    dims = {"dim": 8, "latent_dim": 8, "local": (1, 1), "globally": (1,), "num_heads": 1, "latent_heads": 1}
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module = models.create("fit_tiny_patch8_224", img_size=8 * side, group=group, latents=1, **dims)
        module.eval().requires_grad_(False)
        module(torch.zeros(1, 3, 8 * side, 8 * side))
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if "attention" in str(op) or "bmm" in str(op)) / 2


def test_attention_grows_with_the_power_of_four_thirds():
    few, many = attention_macs(64, 4), attention_macs(512, 8)  # groups of L^(1/3): 16 of 4096, 64 of 262,144
    assert many / few == pytest.approx((512**2 / 64**2) ** (4 / 3), rel=0.05)
    assert attention_macs(512, 32) / few > 2 * (512**2 / 64**2) ** (4 / 3)
