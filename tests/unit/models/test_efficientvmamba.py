"""The scan step by step, what it skips, and the paper's MACs with what it counts for a scan."""

import pytest
import torch
from torch.nn.functional import conv2d, silu, softplus
from torch.utils.flop_counter import FlopCounterMode

from martlet import models
from martlet.models.efficientvmamba import PatchMerging, SelectiveScan, scan, skip, unskip


@pytest.mark.parametrize("length", [1, 2, 7, 16, 17, 49, 66])
def test_scan_is_sequential(length):
    a, b = torch.rand(2, length, 3), torch.randn(2, length, 3)
    h, expected = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(length):
        h = a[:, t].double() * h + b[:, t].double()
        expected.append(h)
    assert torch.allclose(scan(a, b).double(), torch.stack(expected, 1), atol=1e-6)
    if length > 1:
        assert not torch.allclose(scan(a.flip(1), b).double(), torch.stack(expected, 1), atol=1e-4)


def test_skips_cover_every_position_once_and_in_order():
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    parts = skip(x)
    assert sorted(parts.flatten().tolist()) == x.flatten().tolist()
    assert parts[0, 0, 0].tolist() == [0, 2, 4, 12, 14, 16]  # even rows, even columns, row by row
    assert parts[0, 3, 0].tolist() == [7, 19, 9, 21, 11, 23]  # odd rows, odd columns, column by column
    assert torch.equal(unskip(parts, 4, 6), x)


def oracle(layer, x):
    """(H, W, C) in float64: each of the four sequences token by token, from Δ, A, B, C and D."""
    h, w, _ = x.shape
    inner, gate = (x @ layer.in_proj.weight.double().T).chunk(2, -1)
    conv = conv2d(
        inner.permute(2, 0, 1)[None],
        layer.conv.weight.double(),
        layer.conv.bias.double(),
        1,
        1,
        1,
        len(layer.conv.weight),
    )
    inner, out = silu(conv[0]), torch.zeros(conv.shape[1], h, w, dtype=torch.float64)
    rows = lambda a, b: [(i, j) for i in range(a, h, 2) for j in range(b, w, 2)]  # noqa: E731
    columns = lambda a, b: [(i, j) for j in range(b, w, 2) for i in range(a, h, 2)]  # noqa: E731
    for k, places in enumerate([rows(0, 0), columns(1, 0), rows(0, 1), columns(1, 1)]):
        a, state = -layer.a_log[k].double().exp(), torch.zeros(len(inner), layer.states, dtype=torch.float64)
        for i, j in places:
            token = inner[:, i, j]
            dt, b, c = (layer.x_proj[k].double() @ token).split([layer.rank, layer.states, layer.states])
            dt = softplus(layer.dt_proj[k].double() @ dt + layer.dt_bias[k].double())
            state = (dt[:, None] * a).exp() * state + (dt * token)[:, None] * b
            out[:, i, j] = state @ c + layer.d[k].double() * token
    normal = torch.nn.functional.layer_norm(
        out.permute(1, 2, 0), (len(out),), layer.norm.weight.double(), layer.norm.bias.double()
    )
    return (normal * silu(gate)) @ layer.out_proj.weight.double().T


def test_selective_scan_is_the_papers():
    layer, x = SelectiveScan(8, 3, 2.0), torch.randn(1, 4, 6, 8)
    with torch.no_grad():
        layer.dt_bias.normal_()  # states that matter
        expected = oracle(layer, x[0].double())
        assert torch.allclose(layer(x)[0].double(), expected, atol=1e-4)
        layer.a_log.fill_(5)  # nothing is remembered
        assert not torch.allclose(layer(x)[0].double(), expected, atol=1e-3)


def test_merging_takes_four_neighbours():
    layer, x = PatchMerging(2, 3), torch.randn(1, 2, 4, 4)
    neighbours = torch.cat([x[0, :, 2 + dy, 0 + dx] for dx in (0, 1) for dy in (0, 1)])
    with torch.no_grad():
        assert torch.allclose(layer(x)[0, :, 1, 0], layer.proj(layer.norm(neighbours)), atol=1e-6)


@pytest.mark.parametrize("name", ["efficientvmamba_tiny", "efficientvmamba_small", "efficientvmamba_base"])
def test_macs_with_9_for_each_state_are_the_papers(name):
    scanned = []
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        module = models.create(name).eval()
        for part in module.modules():
            if isinstance(part, SelectiveScan):
                part.register_forward_hook(
                    lambda m, args, _: scanned.append(m.a_log.numel() * args[0][0, ..., 0].numel())
                )
        module(torch.zeros(1, 3, 224, 224))
    assert len(scanned) == 4
    assert models.paper(name).models[name].agrees("macs", counter.get_total_flops() // 2 + 9 * sum(scanned) // 4)
