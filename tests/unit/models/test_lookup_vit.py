"""LookupViT is the paper's, by an oracle in float64, one token at a time, for any number of compressed tokens."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from martlet import models
from martlet.core.errors import SourceError
from martlet.models.lookup_vit import LookupBlock, LookupViT

BASE = "lookup_vit_base_patch16_224"
SIZE = (28, 20)
"""Patches 7 by 5: odd in number."""


def tiny() -> LookupViT:
    torch.manual_seed(0)
    module = models.create(
        BASE, img_size=SIZE, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5, compressed=3
    ).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4)
    assert isinstance(module, LookupViT)
    return module


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


def attention(query: Tensor, keys: list[Tensor], heads: int) -> list[list[float]]:
    """The weights of one query (C,), by head."""
    found = []
    for h in range(heads):
        width = len(query) // heads
        part = slice(h * width, (h + 1) * width)
        scores = [float(query[part] @ key[part]) / math.sqrt(width) for key in keys]
        total = sum(math.exp(score) for score in scores)
        found.append([math.exp(score) / total for score in scores])
    return found


def weighed(weights: list[list[float]], values: list[Tensor]) -> Tensor:
    """Values (C,) under the weights of each head."""
    parts = []
    for h, row in enumerate(weights):
        width = len(values[0]) // len(weights)
        parts.append(sum(w * value[h * width : (h + 1) * width] for w, value in zip(row, values, strict=True)))
    return torch.cat(parts)  # type: ignore[arg-type]


def by_hand(
    block: LookupBlock, lookup: list[Tensor], few: list[Tensor], fault: str = ""
) -> tuple[list[Tensor], list[Tensor]]:
    heads, width = block.num_heads, len(lookup[0])
    keys_values = [block.key_value(block.norm_lookup(x)) for x in lookup]
    keys, values = [kv[:width] for kv in keys_values], [kv[width:] for kv in keys_values]
    weights = [attention(block.query(block.norm_compressed(x)), keys, heads) for x in few]  # by compressed token
    few = [x + block.gather(weighed(w, values)) for x, w in zip(few, weights, strict=True)]
    few = [*block.refine(torch.stack(few)[None])[0]]
    refined = [block.value(block.norm_refined(x)) for x in few]
    out = []
    for n, x in enumerate(lookup):
        back = [[weights[m][h][n] for m in range(len(few))] for h in range(heads)]
        if fault == "sums to 1":
            back = [[w / sum(row) for w in row] for row in back]
        x = x + block.infuse(weighed(back, refined))
        out.append(x if fault == "no MLP" else x + block.mlp(block.norm_mlp(x)))
    return out, few


def logits_by_hand(module: LookupViT, side: int, fault: str = "") -> Tensor:
    found = []
    with torch.no_grad():
        for image in images(torch.float64):
            grid = module.patch_embed(image[None]) + module.pos_embed  # (1, N, C)
            resized = functional.interpolate(
                grid.mT.unflatten(2, module.grid), (side, side), mode="bilinear", antialias=fault != "aliased"
            )
            lookup, few = [*grid[0]], [*resized.flatten(2).mT[0]]
            for block in module.blocks:
                lookup, few = by_hand(block, lookup, few, fault)  # type: ignore[arg-type]
            means = [
                sum(map(norm, tokens)) / len(tokens)
                for norm, tokens in ((module.norm_lookup, lookup), (module.norm_compressed, few))
            ]
            found.append(module.head((means[0] + means[1]) / 2))
    return torch.stack(found)


@pytest.mark.parametrize("side", [1, 3, 4])
def test_it_is_the_papers_with_any_number_of_compressed_tokens(side: int) -> None:
    module = tiny().double()
    expected = logits_by_hand(module, side)
    with torch.no_grad():
        torch.testing.assert_close(module(images(torch.float64), side), expected, rtol=1e-9, atol=1e-9)
        module.compressed = side
        torch.testing.assert_close(module(images(torch.float64)), expected, rtol=1e-9, atol=1e-9)


def test_this_can_fail() -> None:
    module = tiny().double()
    with torch.no_grad():
        found = module(images(torch.float64))
    wrong = [logits_by_hand(module, 3, fault) for fault in ("sums to 1", "no MLP", "aliased")]
    for other in (*wrong, logits_by_hand(module, 4)):
        assert not torch.allclose(found, other, rtol=1e-4, atol=1e-4)


def test_one_set_of_weights_has_no_parameter_of_a_number_of_tokens() -> None:
    with torch.device("meta"):
        state = {side: models.create(BASE, compressed=side).state_dict() for side in (3, 14)}
    assert {key: value.shape for key, value in state[3].items()} == {
        key: value.shape for key, value in state[14].items()
    }


def test_macs_are_half_of_vit_b_and_as_the_docstring_says() -> None:
    with torch.device("meta"):
        model = models.create(BASE).eval()

    def macs(side: int) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 224, 224), side)
        return counter.get_total_flops() // 2

    n, c = 196, 768
    plain = 12 * (2 * (n + 1) ** 2 * c + 12 * (n + 1) * c * c) + n * c * c + 1000 * c
    found = {m: macs(int(m**0.5)) for m in (9, 25)}
    assert found[25] == pytest.approx(plain / 2, rel=0.1)
    for m, counted in found.items():
        blocks = 12 * ((3 * n * m + 2 * m * m) * c + (4 * n + 15 * m) * c * c)
        assert counted == blocks + n * c * c + m * n * c + 1000 * c


@pytest.mark.parametrize("side", [0, 6, -1])
def test_compressed_tokens_fit_the_grid(side: int) -> None:
    module = tiny()
    with pytest.raises(SourceError, match=rf"compressed is {side}; with patches \(7, 5\) it can be 1 to 5"):
        module.compressed = side
    with pytest.raises(SourceError, match=f"compressed is {side}"):
        module(images(), side)
