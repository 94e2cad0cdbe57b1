"""mctf is the paper's, in whole models, on an oracle that fuses one pair at a time; and costs what the paper states."""

import math
from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from token_oracle import images, logits_with, vit
from torch import Tensor

from martlet.core.model import Model
from martlet.data.preprocess import Preprocess
from martlet.measure.macs import macs
from martlet.source import load_model
from martlet.techniques.tokens.mctf import MCTF
from martlet.vit import view
from martlet.vit.tokens import Reading, install_

SCHEDULE = {1: 5, 2: 3, 3: 2}
TEMPERATURES = (1.0, 1 / 20, 1 / 40)


def matched(x: Tensor, seen: Tensor, size: Tensor, r: int, prefix: int, temperatures: tuple[float, float, float]):
    """The groups, as lists of tokens: prefix, those of even number that are left, those of odd number that are."""
    similarity, informativeness, by_size = temperatures

    def pull(i: int, j: int) -> float:
        alike = (1 + float(torch.cosine_similarity(x[i], x[j], dim=0))) / 2
        return (
            alike**similarity
            * (1 / float(seen[i] * seen[j])) ** informativeness
            * (1 / float(size[i] * size[j])) ** by_size
        )

    groups = {t: [t] for t in range(len(x))}
    even = [t for t in range(prefix, len(x)) if t % 2 == 0]
    odd = [t for t in range(prefix, len(x)) if t % 2 == 1]
    for sources, destinations, n in ((even, odd, r // 2), (odd, even, r - r // 2)):
        edges = sorted(((max((pull(s, d), d) for d in destinations), s) for s in sources), reverse=True)
        for (_, d), s in edges[:n]:
            groups[d] += groups.pop(s)
            sources.remove(s)
    return [groups[t] for t in (*range(prefix), *even, *odd)]


def logits_by_hand(
    module: VisionTransformer,
    schedule: dict[int, int],
    temperatures: tuple[float, float, float] = TEMPERATURES,
    columns: str = "sum",
) -> Tensor:
    out = []
    with torch.no_grad():
        embedded = module.norm_pre(module._pos_embed(module.patch_embed(images())))
        for x in embedded:
            size = torch.ones(len(x), dtype=x.dtype)
            for i, block in enumerate(module.blocks):
                heads, width = block.attn.num_heads, block.attn.head_dim
                q, k, v = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, heads, width).unbind(1)
                q, k = block.attn.q_norm(q), block.attn.k_norm(k)
                scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(width) + size.log()
                attention = scores.softmax(-1)  # (H, N, N), the one-step-ahead attention: that of this very block
                if i in schedule:
                    seen = attention.mean((0, 1))
                    groups = matched(x, seen, size, schedule[i], module.num_prefix_tokens, temperatures)
                    weight = seen * size
                    rows = []
                    for group in groups:
                        part = weight[group] / weight[group].sum()
                        rows.append(torch.stack([attention[:, t] * p for t, p in zip(group, part, strict=True)]).sum(0))
                    fused = torch.stack(rows, 1)  # (H, M, N)
                    fused = torch.stack([getattr(fused[..., g], columns)(-1) for g in groups], -1)  # (H, M, M)
                    x = torch.stack([(weight[g, None] * x[g]).sum(0) / weight[g].sum() for g in groups])
                    size = torch.stack([size[g].sum() for g in groups])
                    attention = fused
                    v = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, heads, width)[:, 2]
                mixed = torch.einsum("hij,jhd->ihd", attention, v).flatten(1)
                x = x + block.attn.proj(mixed)
                x = x + block.mlp(block.norm2(x))
            out.append(module.head(module.norm(x[0])))
    return torch.stack(out)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2, "qk_norm": True}])
def test_mctf_is_the_papers(kwargs: dict[str, object]) -> None:
    module = vit(**kwargs)
    found = logits_with(module, MCTF(r=SCHEDULE))
    torch.testing.assert_close(found, logits_by_hand(module, SCHEDULE), rtol=1e-9, atol=1e-9)


def test_this_can_fail() -> None:
    module = vit()
    found = logits_with(module, MCTF(r=SCHEDULE))
    assert not torch.allclose(found, logits_by_hand(module, SCHEDULE | {2: 2}), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits_by_hand(module, SCHEDULE, columns="mean"), rtol=1e-4, atol=1e-4)
    for temperatures in ((0.0, 1 / 20, 1 / 40), (1.0, 0.0, 1 / 40), (1.0, 1 / 20, 3.0)):
        assert not torch.allclose(found, logits_by_hand(module, SCHEDULE, temperatures), rtol=1e-4, atol=1e-4)


def test_one_step_ahead_attention_of_tokens_that_are_equal_is_the_next_layers() -> None:
    """Of patches that are all alike nothing is lost, so the fused attention is what the block would have computed."""
    module = vit()
    with torch.no_grad():
        module.pos_embed.zero_()
    model = Model(name="vit", module=module.float(), preprocess=Preprocess(size=(40, 24)), num_classes=7, origin={})
    x = torch.ones(1, 3, 40, 24)
    with torch.no_grad():
        expected = module(x)
        vit_view = view(model.module)
        install_(MCTF().run(vit_view, Reading(16, None), {1: 6, 2: 3}))
        torch.testing.assert_close(model.module(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gmacs"), [("deit_small_patch16_224", 2.60), ("deit_tiny_patch16_224", 0.71)])
def test_macs_are_the_papers(name: str, gmacs: float) -> None:
    """With 16 fused in each block but the first, and a last block that computes all tokens, as the paper has it."""
    model = load_model(f"timm:{name}")
    whole = macs(model) / 1e9
    technique = MCTF()
    vit_view = view(model.module)
    schedule = dict.fromkeys(range(1, 12), 16)
    install_(technique.run(vit_view, Reading(197, None), schedule))
    dense = macs(model) / 1e9
    assert dense == pytest.approx(gmacs, rel=0.02)
    assert replace(technique, r=16) != technique
    assert whole > 1.6 * dense
