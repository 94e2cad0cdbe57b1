"""Slices are masked attention; one slice is recursion without; the second pass adds no shared parameters."""

import pytest
import torch
from torch.nn.functional import linear

from martlet import models
from martlet.core.errors import SourceError
from martlet.models.sret import SlicedAttention


def oracle(layer, x, again):
    """(N, C) in float64: each token sees those of its group, one by one."""
    n, g = len(x), layer.groups[again]
    q, k, v = linear(x, layer.qkv.weight.double(), layer.qkv.bias.double()).chunk(3, -1)
    d, out = q.shape[-1] // layer.num_heads, torch.zeros_like(q)
    for i in range(n):
        seen = [j for j in range(n) if (j % g == i % g if again else j // (n // g) == i // (n // g))]
        for head in range(layer.num_heads):
            part = slice(head * d, (head + 1) * d)
            out[i, part] = (k[seen][:, part] @ q[i, part] / d**0.5).softmax(0) @ v[seen][:, part]
    return linear(out, layer.proj.weight.double(), layer.proj.bias.double())


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("groups", [(4, 2), (1, 1)])
def test_slices_are_masked_attention(groups, again):
    layer, x = SlicedAttention(8, 2, groups), torch.randn(1, 12, 8)
    with torch.no_grad():
        assert torch.allclose(layer(x, again)[0].double(), oracle(layer, x[0].double(), again), atol=1e-5)
        if groups != (1, 1):
            assert not torch.allclose(layer(x, again)[0].double(), oracle(layer, x[0].double(), not again), atol=1e-3)


def test_one_group_is_unsliced_recursion():
    torch.manual_seed(0)
    dims = {"img_size": 32, "dims": (16, 32), "depths": (1, 1), "num_heads": (2, 2)}
    one = models.create("sret_tiny", groups=((1, 1), (1, 1)), **dims).eval()
    other = models.create("sret_tiny_unsliced", groups=((1, 1), (1, 1)), **dims).eval()
    other.load_state_dict(one.state_dict())
    sliced = models.create("sret_tiny", groups=((4, 2), (1, 1)), **dims).eval()
    sliced.load_state_dict(one.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))
        assert not torch.allclose(one(x), sliced(x), atol=1e-6)


def test_blocks_run_twice_and_have_one_set_of_weights():
    with torch.device("meta"):
        stage = models.create("sret_tiny").stages[1]
    assert (len(stage.blocks), len(stage.projections)) == (5, 10)
    calls = []
    stage = models.create("sret_tiny", img_size=32, dims=(16, 32), depths=(1, 1), num_heads=(2, 2)).stages[0]
    stage.blocks[0].register_forward_hook(lambda module, args, output: calls.append(args[1]))
    stage(torch.randn(1, 16, 4, 4))
    assert calls == [False, True]


def test_tokens_that_no_group_divides_are_one_clear_line():
    with pytest.raises(SourceError, match=r"can't slice 9 tokens into groups of \(4, 2\)"):
        models.create("sret_tiny", img_size=24, depths=(1,), dims=(16,), num_heads=(2,), groups=((4, 2),))
