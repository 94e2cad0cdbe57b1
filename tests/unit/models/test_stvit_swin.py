"""STViT-R Swin: semantic tokens are those of the paper, gathered from larger windows, and recovered from."""

import pytest
import torch
from families import FAMILIES
from torch.nn.functional import adaptive_max_pool2d, unfold

from martlet import models
from martlet.core.errors import SourceError
from martlet.models.stvit_swin import AttendBlock, SemanticBlocks

NAME = "stvit_r_swin_small_patch4_window7_224"


def blocks(size, window=7, samples=3, overlap=3):
    torch.manual_seed(0)
    made = SemanticBlocks(8, size, 2, window, samples, overlap, 2.0, [0.0] * 6).double().eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_params_are_those_of_the_authors_logs_to_the_last_one():
    with torch.device("meta"):
        assert sum(p.numel() for p in models.create(NAME).parameters()) == 49_625_518


def test_windows_are_those_of_the_authors():
    x = torch.randn(2, 14, 14, 8).double()
    first, seen = blocks((14, 14)).windows(x)
    cells = x.permute(0, 3, 1, 2).unfold(2, 7, 7).unfold(3, 7, 7).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    torch.testing.assert_close(first, adaptive_max_pool2d(cells, 3).flatten(2).mT)
    larger = unfold(x.permute(0, 3, 1, 2), 10, stride=4).view(2, 8, 100, 4).permute(0, 3, 2, 1).flatten(0, 1)
    torch.testing.assert_close(seen, torch.cat([first, larger], 1))


def test_larger_windows_hold_their_own_on_any_size():
    made = blocks((28, 21))
    for side in (28, 21):
        for i, reach in enumerate(made._reach(side)):
            assert set(range(7 * i, 7 * i + 7)) <= set(reach.tolist())
            assert reach.min() == reach[0] >= 0
            assert reach.max() == reach[-1] < side


def plain(block, x, others):
    """Attention row by row, of one image: what each token of x (N, C) finds among others (M, C), then the MLP."""
    q, kv = block.q(block.norm1(x)), block.kv(block.norm1(others))
    k, v = kv.chunk(2, -1)
    found, each = torch.zeros_like(x), x.shape[-1] // block.num_heads
    for n in range(x.shape[0]):
        for head in range(block.num_heads):
            part = slice(head * each, (head + 1) * each)
            scores = torch.stack([q[n, part] @ k[m, part] / each**0.5 for m in range(others.shape[0])]).exp()
            found[n, part] = (scores[:, None] * v[:, part]).sum(0) / scores.sum()
    found = block.proj(found) * block.scale1.gamma
    x = x + found if block.residual else found
    return x + block.mlp(block.norm2(x)) * block.scale2.gamma


@torch.no_grad()
def oracle(made, x):
    """(1, H, W, C), window by window, with 2 × 2 semantic tokens in each window of 4 × 4, and overlap 2."""
    x = made.local(x)[0]
    rows, columns = x.shape[0] // 4, x.shape[1] // 4
    grid = torch.zeros(2 * rows, 2 * columns, x.shape[-1], dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            own = x[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            first = torch.stack([own[a : a + 2, b : b + 2].amax((0, 1)) for a in (0, 2) for b in (0, 2)])
            top, left = (round(k * (side - 6) / max(n - 1, 1)) for k, n, side in ((i, rows, 8), (j, columns, 12)))
            larger = x[top : top + 6, left : left + 6].flatten(0, 1)
            semantic = plain(made.gather, first, torch.cat([first, larger]))
            grid[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = semantic.unflatten(0, (2, 2))
    semantic, image = grid.flatten(0, 1), x.flatten(0, 1)
    grid = plain(made.center, semantic, torch.cat([semantic, image])).view_as(grid)
    for i in range(rows):
        for j in range(columns):
            inside = grid[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(0, 1)
            grid[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = plain(made.within, inside, inside).unflatten(0, (2, 2))
    semantic = grid.flatten(0, 1)
    semantic = plain(made.among, semantic, semantic)
    return plain(made.recover, image, semantic).view_as(x)


def test_six_blocks_are_the_papers():
    made, x = blocks((8, 12), window=4, samples=2, overlap=2), torch.randn(1, 8, 12, 8).double()
    expected = oracle(made, x)
    with torch.no_grad():
        torch.testing.assert_close(made(x)[0], expected)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(made(x.flip(1))[0], expected)


def test_without_the_residual_attention_takes_the_place_of_tokens():
    torch.manual_seed(0)
    block = AttendBlock(8, 2, 2.0, 0.0, residual=False).eval()
    torch.nn.init.zeros_(block.scale1.gamma)
    torch.nn.init.zeros_(block.scale2.gamma)
    assert not block(torch.randn(1, 4, 8), torch.randn(1, 9, 8)).any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"img_size": (32, 40)}, "sides are multiples of 32, not 32 × 40"),
        ({"depths": (2, 5)}, "stage 1 has blocks by sixes, not 5"),
    ],
)
def test_what_does_not_fit_is_refused(change, says):
    with pytest.raises(SourceError, match=says):
        models.create(NAME, **(FAMILIES[NAME].tiny | change))
