"""Hierarchical attention is full attention of tokens and carriers in which most pairs are masked."""

import pytest
import torch
from torch.nn.functional import layer_norm

from martlet.models.fastervit import HierarchicalBlock, HierarchicalStage, PositionBias


def attend(block, x, mask, scores_bias):
    """x + proj(softmax over the allowed pairs) and the MLP, on (N, C); the bias is (heads, N, N)."""
    attention, n = block.mixer, len(x)
    q, k, v = attention.qkv(layer_norm(x, x.shape[1:], block.norm1.weight, block.norm1.bias)).chunk(3, -1)
    d, out = q.shape[-1] // attention.num_heads, torch.zeros_like(x)
    for head in range(attention.num_heads):
        part = slice(head * d, (head + 1) * d)
        for i in range(n):
            seen = mask[i].nonzero().flatten()
            scores = (k[seen][:, part] @ q[i, part]) / d**0.5 + scores_bias[head, i, seen]
            out[i, part] = scores.softmax(0) @ v[seen][:, part]
    x = x + attention.proj(out)
    return x + block.mlp(block.norm2(x))


def test_hierarchical_attention_is_masked_full_attention():
    block = HierarchicalBlock(8, 2, (2, 2), (2, 3), 1, 2.0, 0.0).double()  # 2 · 3 windows of 2 · 2, a carrier each
    x, carriers = torch.randn(6, 4, 8).double(), torch.randn(1, 6, 8).double()
    with torch.no_grad():
        tokens, talked = block(x, carriers)
        everyone = torch.ones(6, 6, dtype=torch.bool)
        placed = carriers[0] + block.carrier_position.mlp(block.carrier_position.places)
        first = attend(block.globally, placed, everyone, block.globally.mixer.bias())
        # one sequence: six carriers, then six windows of four; each sees its window and that window's carrier
        flat = torch.cat([first, (x + block.position.mlp(block.position.places)).flatten(0, 1)])
        window = torch.cat([torch.arange(6), torch.arange(6).repeat_interleave(4)])
        place = torch.cat([torch.zeros(6), 1 + torch.arange(4).repeat(6)]).long()
        local = block.local.mixer.bias()[:, place[:, None], place]
        expected = attend(block.local, flat, window[:, None] == window, local)
        assert torch.allclose(talked[0], expected[:6], atol=1e-9)
        assert torch.allclose(tokens.flatten(0, 1), expected[6:], atol=1e-9)
        wrong = attend(block.local, flat, torch.ones(30, 30, dtype=torch.bool), local)
        assert not torch.allclose(tokens.flatten(0, 1), wrong[6:], atol=1e-3)


def test_bias_is_log_spaced_and_none_of_carriers():
    layer = PositionBias(2, (3, 3), carriers=2).double()
    found = layer()
    assert found.shape == (2, 11, 11)
    assert not found[:, :2].any()
    assert not found[..., :2].any()
    for i in range(9):
        for j in range(9):
            away = torch.tensor([8 * (i // 3 - j // 3) / 2, 8 * (i % 3 - j % 3) / 2]).double()
            spaced = away.sign() * (1 + away.abs()).log2() / torch.tensor(8.0).log2()
            assert torch.allclose(found[:, 2 + i, 2 + j], 16 * layer.mlp(spaced).sigmoid(), atol=1e-6)


def test_scales_multiply_attention_and_mlp():
    block = HierarchicalBlock(8, 2, (2, 2), (2, 3), 1, 2.0, 0.0, layer_scale=1.0).double()
    x, carriers = torch.randn(6, 4, 8).double(), torch.randn(1, 6, 8).double()
    plain = HierarchicalBlock(8, 2, (2, 2), (2, 3), 1, 2.0, 0.0).double()
    named = list(block.named_parameters())
    scales = [value for name, value in named if name.endswith("gamma")]
    others = [value for name, value in named if not name.endswith("gamma")]
    for mine, value in zip(plain.parameters(), others, strict=True):
        mine.data = value.data
    with torch.no_grad():
        assert torch.allclose(block(x, carriers)[0], plain(x, carriers)[0], atol=1e-9)
        for scale in scales:
            scale.zero_()
        assert torch.equal(block(x, carriers)[0], block.position(x))
    assert [scale.shape for scale in scales] == [(8,)] * 4


def test_carriers_are_propagated_to_the_nearest_tokens():
    block = HierarchicalBlock(8, 2, (3, 3), (4, 4), 2, 2.0, 0.0, layer_scale=0.5, propagate=True).double()
    x, carriers = torch.randn(4, 9, 8).double(), torch.randn(1, 16, 8).double()  # 2 · 2 windows of 3 · 3
    with torch.no_grad():
        scale = block.globally.mixer[1].gamma.copy_(torch.randn(8))
        tokens, talked = block(x, carriers)
        block.propagate = False
        added = tokens - block(x, carriers)[0]
    for window in range(4):
        for token in range(9):
            row, column = 2 * (window // 2) + 2 * (token // 3) // 3, 2 * (window % 2) + 2 * (token % 3) // 3
            assert torch.allclose(added[window, token], scale * talked[0, 4 * row + column], atol=1e-9)


@pytest.mark.parametrize(("size", "hat", "has"), [((4, 4), True, True), ((2, 2), True, False), ((4, 4), False, False)])
def test_who_has_carriers(size, hat, has):
    rates = {"rates": [0.0], "num_heads": 2, "mlp_ratio": 1.0}
    stage = HierarchicalStage(torch.nn.Identity(), 8, size, 2, 1, hat, **rates).eval()
    assert stage.has_carriers == has
    x = torch.randn(1, 8, *size)
    y = x.clone()
    y[..., -1, -1] += torch.randn(8)
    with torch.no_grad():
        changed = (stage(y) - stage(x)).abs().amax((0, 1)) > 1e-6
    assert changed[0, 0] == (has or size == (2, 2))  # other windows hear of it through carriers alone
