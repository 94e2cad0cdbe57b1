"""The shift moves whole channels by one pixel, and does nothing else."""

import torch
from families import tiny

from martlet.models.shiftvit import ShiftBlock, shift


def oracle(x, parts):
    """Pixel by pixel, (C, H, W): where each output comes from (Figure 2)."""
    c, h, w = x.shape
    g, out = c // parts, torch.zeros_like(x)
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0)]  # left, right, up, down: what comes from there
    for channel in range(c):
        dy, dx = steps[channel // g] if channel < 4 * g else (0, 0)
        for i in range(h):
            for j in range(w):
                if 0 <= i + dy < h and 0 <= j + dx < w:
                    out[channel, i, j] = x[channel, i + dy, j + dx]
    return out


def test_shift_is_the_papers():
    x = torch.randn(2, 26, 3, 4)  # 26 = 12 · 2 + 2: some are left over
    assert torch.equal(shift(x, 12)[1], oracle(x[1], 12))
    assert not torch.equal(shift(x, 6)[1], oracle(x[1], 12))


def test_it_has_no_parameters_and_only_moves_channels():
    block = ShiftBlock(24, 1.0, 12, 0.0)
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"norm", "mlp"}
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    x = torch.zeros(1, 24, 5, 5)
    x[:, :, 2, 2] = 1 + torch.arange(24)
    moved = block(x)
    assert sorted(moved[moved != 0].tolist()) == sorted(x[x != 0].tolist())


def test_no_module_mixes_positions_but_patches():
    kernels = {m.kernel_size for m in tiny("shiftvit_tiny").modules() if isinstance(m, torch.nn.Conv2d)}
    assert kernels == {(4, 4), (2, 2), (1, 1)}
