"""stvit is the paper's, in whole models, on an oracle that computes one token at a time."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from token_oracle import images, logits_with, vit
from torch import Tensor

from martlet.techniques.tokens.stvit import STViT

GRID, TOKENS, AT = (5, 3), (2, 2), 1
"""Cells of 3 or 2 by 2 or 1 patches."""
MODELS = [{}, {"reg_tokens": 2, "qk_norm": True}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}]


def through(block: torch.nn.Module, tokens: list[Tensor], context: list[Tensor], sizes: list[float]) -> list[Tensor]:
    """Each token after the block, with keys and values of the context, of which each counts as many times."""
    attention, out = block.attn, []
    heads, width = attention.num_heads, attention.head_dim
    keys_values = [attention.qkv(block.norm1(x)).reshape(3, heads, width)[1:] for x in context]
    for x in tokens:
        query = attention.q_norm(attention.qkv(block.norm1(x)).reshape(3, heads, width)[0])
        parts = []
        for h in range(heads):
            scores = [float(query[h] @ attention.k_norm(kv[0])[h]) / math.sqrt(width) for kv in keys_values]
            weights = [size * math.exp(score) for score, size in zip(scores, sizes, strict=True)]
            parts.append(sum(w / sum(weights) * kv[1][h] for w, kv in zip(weights, keys_values, strict=True)))
        x = x + attention.proj(torch.cat(parts))  # type: ignore[arg-type]
        out.append(x + block.mlp(block.norm2(x)))
    return out


def logits_by_hand(module: VisionTransformer, recover: bool = False, fault: str = "") -> Tensor:
    prefix, out = module.num_prefix_tokens, []
    cell = [(i // GRID[1] * TOKENS[0] // GRID[0], i % GRID[1] * TOKENS[1] // GRID[1]) for i in range(15)]
    cells = [(i, j) for i in range(TOKENS[0]) for j in range(TOKENS[1])]
    with torch.no_grad():
        for image in module.norm_pre(module._pos_embed(module.patch_embed(images()))):
            tokens = [*image]
            for block in module.blocks[:AT]:
                tokens = through(block, tokens, tokens, [1.0] * len(tokens))
            patches = tokens[prefix:]
            members = [[x for x, at in zip(patches, cell, strict=True) if at == each] for each in cells]
            sizes = [1.0] * prefix + [float(len(group)) for group in members]
            if fault == "sizes":
                sizes = [1.0] * len(sizes)
            few = tokens[:prefix] + [sum(group) / len(group) for group in members]  # type: ignore[list-item]
            if fault == "maximum":
                few = tokens[:prefix] + [torch.stack(group).amax(0) for group in members]
            few = through(module.blocks[AT], few, tokens, [1.0] * len(tokens))
            context = few if fault == "alone" else few + patches
            few = through(module.blocks[AT + 1], few, context, [1.0] * len(context))
            later = module.blocks[AT + 2 :]
            for block in later[:-1] if recover else later:
                few = through(block, few, few, sizes)
            if recover:
                every = through(later[-1], few[:prefix] + patches, few, sizes)
            else:
                every = few[:prefix] + [few[prefix + cells.index(at)] for at in cell]
            read = torch.stack(every[prefix:]).mean(0) if module.global_pool == "avg" else every[0]
            out.append(module.head(module.fc_norm(module.norm(read) if module.global_pool == "token" else read)))
    return torch.stack(out)


@pytest.mark.parametrize("kwargs", MODELS)
def test_stvit_is_the_papers(kwargs: dict[str, object]) -> None:
    module = vit(**kwargs)
    found = logits_with(module, STViT(tokens=[*TOKENS], at=AT))
    torch.testing.assert_close(found, logits_by_hand(module), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kwargs", MODELS[2:])
def test_so_is_its_recovery(kwargs: dict[str, object]) -> None:
    module = vit(**kwargs)
    found = logits_with(module, STViT(tokens=[*TOKENS], at=AT, recover=True))
    torch.testing.assert_close(found, logits_by_hand(module, recover=True), rtol=1e-8, atol=1e-8)


def test_this_can_fail() -> None:
    module = vit(global_pool="avg")
    found = logits_with(module, STViT(tokens=[*TOKENS], at=AT))
    for fault in ("sizes", "maximum", "alone"):
        assert not torch.allclose(found, logits_by_hand(module, fault=fault), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits_by_hand(module, recover=True), rtol=1e-4, atol=1e-4)
