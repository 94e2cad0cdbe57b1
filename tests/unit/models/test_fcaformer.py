"""Forward cross attention token by token, and how many cross tokens each block sees."""

import pytest
import torch
from torch.nn.functional import layer_norm, linear

from martlet.models.fcaformer import ForwardCrossBlock, ForwardCrossStage


def oracle(layer, x, cross):
    """(N, C) and (S, C) in float64, head by head: tokens ask, tokens and scaled cross tokens answer (eq. 1-3)."""
    (h, w), heads = layer.size, layer.num_heads

    def project(tokens, norm):
        tokens = layer_norm(tokens, tokens.shape[-1:], norm.weight.double(), norm.bias.double())
        return linear(tokens, layer.qkv.weight.double(), layer.qkv.bias.double()).chunk(3, -1)

    q, k, v = project(x, layer.norm1)
    if cross is not None:
        _, more_k, more_v = project(cross * layer.cross_scale[0].double(), layer.cross_norm)
        k, v = torch.cat([k, more_k]), torch.cat([v, more_v])
    d, out = q.shape[-1] // heads, torch.zeros_like(q)
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        for n in range(h * w):
            scores = k[:, part] @ q[n, part] / d**0.5
            for m in range(h * w):
                scores[m] += layer.position[head, abs(n // w - m // w) * w + abs(n % w - m % w)].double()
            if cross is not None:
                scores[h * w :] += layer.cross_bias[head, 0].double()
            out[n, part] = scores.softmax(0) @ v[:, part]
    return linear(out, layer.proj.weight.double(), layer.proj.bias.double())


@pytest.mark.parametrize("cross", [0, 3])
def test_forward_cross_attention_is_the_papers(cross):
    layer, x = ForwardCrossBlock(8, 2, (3, 4), cross, True, 1.0, 0.0), torch.randn(1, 12, 8)
    tokens = torch.randn(1, cross, 8) if cross else None
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("position", "cross")):
                parameter.normal_()
        expected = oracle(layer, x[0].double(), None if tokens is None else tokens[0].double())
        assert torch.allclose(layer.attend(x, tokens)[0].double(), expected, atol=1e-5)
        layer.position.neg_()
        assert not torch.allclose(layer.attend(x, tokens)[0].double(), expected, atol=1e-3)


def test_without_cross_tokens_it_is_the_plain_block():
    torch.manual_seed(0)
    plain, crossed = (ForwardCrossBlock(8, 2, (4, 4), cross, True, 1.0, 0.0) for cross in (0, 2))
    crossed.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 16, 8)
    with torch.no_grad():
        crossed.cross_bias.fill_(float("-inf"))  # nobody listens to them
        assert torch.allclose(crossed.attend(x, torch.randn(1, 2, 8)), plain.attend(x, None), atol=1e-6)


@pytest.mark.parametrize(("memory", "expected"), [(12, [None, 4, 8, 12]), (2, [None, 4, 8, 8])])
def test_blocks_see_what_memory_keeps(memory, expected):
    stage = ForwardCrossStage(torch.nn.Identity(), 8, 2, (5, 8), 1.0, [0.0] * 4, memory)  # 2 · 2 merged tokens each
    assert [getattr(block, "cross_scale", torch.zeros(1, 0, 1)).shape[1] or None for block in stage.blocks] == expected
    assert stage.blocks[-1].merge is None
    assert stage(torch.randn(2, 8, 5, 8)).shape == (2, 8, 5, 8)
