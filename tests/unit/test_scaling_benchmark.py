"""benchmarks/scaling.py: its networks attend where they say, it goes on where it stopped, and its numbers are right."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
nets = pytest.importorskip("setups.scaling_nets")
scaling = pytest.importorskip("scaling")


def test_topologies_are_different_members_of_the_space_and_run() -> None:
    drawn = list(nets.draw(12, seed=0))
    assert drawn == list(nets.draw(24, seed=0))[:12]
    assert len({tuple(choices.values()) for choices in drawn}) == 12
    for choices in drawn[:4]:
        assert all(value in nets.SPACE[name] for name, value in choices.items())
        module = nets.staged(choices, 16, (1, 2, 1), seed=1)
        again = nets.staged(choices, 16, (1, 2, 1), seed=1)
        assert module(torch.ones(2, 3, 32, 32)).shape == (2, 10)
        assert all(map(torch.equal, module.state_dict().values(), again.state_dict().values()))
        assert nets.staged(choices, 16, (1, 1, 1), seed=0, num_classes=0)(torch.ones(2, 3, 32, 32)).shape == (2, 64)


@torch.no_grad()
def test_a_block_attends_inside_of_its_windows_alone() -> None:
    torch.manual_seed(0)
    block = nets.Block(8, heads=2, splits=2, expansion=2)
    x = torch.randn(1, 4, 4, 8)
    y = block(x)
    for top in (0, 2):
        for left in (0, 2):
            window = x[:, top : top + 2, left : left + 2]
            q, k, v = block.qkv(block.norm1(window.reshape(4, 8))).split(8, 1)
            mixed = torch.cat(
                [
                    (q[:, h : h + 4] @ k[:, h : h + 4].T / 2).softmax(1) @ v[:, h : h + 4]
                    for h in (0, 4)  # √4 is 2
                ],
                1,
            )
            after = window.reshape(4, 8) + block.proj(mixed)
            after = after + block.mlp(block.norm2(after))
            torch.testing.assert_close(y[:, top : top + 2, left : left + 2].reshape(4, 8), after)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_tokens_are_made_of_squares_that_overlap(kernel: int) -> None:
    torch.manual_seed(0)
    merge = nets.Merge(kernel, 2, 6, 5)
    x = torch.randn(1, 4, 4, 6)
    before = (kernel - 2) // 2
    padded = torch.nn.functional.pad(x, (0, 0, before, kernel - 2 - before, before, kernel - 2 - before))
    for i in range(2):
        for j in range(2):
            square = padded[:, 2 * i : 2 * i + kernel, 2 * j : 2 * j + kernel].permute(0, 3, 1, 2).reshape(1, -1)
            torch.testing.assert_close(merge(x)[:, i, j], merge.linear(merge.norm(square)))


def test_networks_are_drawn_alike_and_the_first_ones_are_large() -> None:
    drawn = list(scaling.networks(seed=0))
    assert drawn == list(scaling.networks(seed=0))
    assert [its["side"] == 32 for its in drawn] == [True] * scaling.LARGE + [False] * scaling.SMALL
    assert {its["width"] for its in drawn} == {*scaling.WIDTHS}
    assert all(set(its["depths"]) <= {*scaling.DEPTHS} and len(its["depths"]) == 3 for its in drawn)
    assert scaling.factors_of(drawn[0] | {"depths": [1, 2, 3]})["depth"] == 6
    small = drawn[-1]
    module = nets.staged(small["choices"], small["width"], small["depths"], 0)
    assert module(torch.ones(1, 3, small["side"], small["side"])).shape == (1, 10)


def rows(n: int) -> list[dict[str, Any]]:
    """Stretches that tell the accuracy but for chance, and conditions that tell nothing."""
    rng, found = np.random.default_rng(0), []
    for its in list(scaling.networks(seed=1))[-n:]:
        top1 = 30 + 5 * np.log2(its["width"]) + 5 * np.log2(its["side"] / 32) + rng.normal(0, 0.3)
        its |= {"length_distortion": float(np.exp(top1 / 10)), "ntk_condition": float(rng.uniform(1, 100))}
        found.append({**its, "top1_pct": float(top1), "params": 1, "macs": int(rng.integers(1, 99))})
    return found


def test_rank_correlations() -> None:
    found = scaling.correlations(rows(24))["measures"]
    assert found["length_distortion"]["tau"] == pytest.approx(1.0)
    assert abs(found["-ntk_condition"]["tau"]) < 0.4
    low, high = found["both"]["interval_90"]
    assert low < found["both"]["tau"] < high
    assert 0.2 < found["both"]["tau"] < 1


def test_held_out_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "SPLITS", 2)
    found = scaling.held_out(rows(14))
    assert found["spearman"]["gaussian_process"]["median"] > 0.8
    assert found["spearman_one_left_out"] > 0.8
    assert (found["fitted"], found["held_out"]) == (6, 8)
    assert found["spearman"]["macs"]["median"] < found["spearman"]["gaussian_process"]["median"]


def test_a_row_that_is_there_isnt_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []

    def train(module: torch.nn.Module, side: int, *_: Any) -> dict[str, Any]:
        trained.append(side)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return {"top1_pct": 1.0 * len(trained), "cpu_seconds": 1.0, "params": 1, "macs": 1}

    monkeypatch.setattr(scaling, "trained", train)
    monkeypatch.setattr(scaling, "LARGE", 3)
    monkeypatch.setattr(scaling, "SMALL", 1)
    out = tmp_path / "scaling.json"
    with pytest.raises(KeyboardInterrupt):
        scaling.main(["networks", "--out", str(out)])
    assert len(json.loads(out.read_text())["networks"]) == 2
    assert scaling.main(["networks", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["networks"]
    assert [row["top1_pct"] for row in found] == [1.0, 2.0, 4.0, 5.0]
    assert [row["choices"] for row in found] == list(nets.draw(4, seed=0))
