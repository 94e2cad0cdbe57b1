"""Rotations of residual streams and of heads: exact, whole, and counted where there can be none."""

import copy

import pytest
import torch
from small_vits import SIZE, VITS, Noise, error, logits, traced, vit
from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.core.technique import silent
from martlet.functional.quantize.rotation import klt_basis, rotation, standard_basis, variance_spread
from martlet.graph.attention import attentions
from martlet.graph.rewrite.layout import scale_after_scores_
from martlet.graph.rewrite.rotate import (
    Stream,
    covariances,
    fold_norms_,
    rotate_scores_,
    rotate_stream_,
    rotate_values_,
    streams,
)
from martlet.graph.sites import aten
from martlet.graph.trace import trace

IMAGES = torch.cat(list(Noise()))


def turn(size: int, seed: int = 0, keep_ones: bool = True) -> Tensor:
    basis = standard_basis(size) if keep_ones else torch.eye(size)
    return rotation(basis, torch.Generator().manual_seed(seed))


def rotate(graph_module: GraphModule) -> list[Stream]:
    found = streams(graph_module).found
    for stream in found:
        fold_norms_(graph_module, stream)
        rotate_stream_(graph_module, stream, turn(stream.width))
    return found


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in module.named_parameters()}


class Hybrid(nn.Module):
    """A convolution gives the tokens and another of one pixel reads the last norm, as between stages of MobileViT."""

    def __init__(self, kernel: int = 1) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(3, 12, 4, stride=4), nn.Conv2d(12, 5, kernel, padding=kernel // 2)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.wide, self.narrow = nn.Linear(12, 20), nn.Linear(20, 12)
        self.gamma = nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        b, c, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        x = x + self.gamma * self.narrow(self.wide(self.norms[0](x)).relu())
        x = self.norms[1](x).transpose(1, 2).reshape(b, c, h, w)
        return self.out(x).mean((2, 3))


@pytest.mark.parametrize("name", VITS)
def test_logits_stay_the_same_to_1e_4(name: str) -> None:
    graph_module = traced(name)
    exact, before = logits(graph_module), parameters(graph_module)
    found = rotate(graph_module)
    assert len(found) == (0 if name == "convolutions" else 1)
    assert error(exact, logits(graph_module)) < 1e-4
    after = parameters(graph_module)
    for stream in found:
        assert len(stream.norms) == len(stream.all_readers) > 1
        moved = {n for n in before if not torch.allclose(after[n], before[n])}
        assert len(moved) >= 2 * len(stream.norms) + len(stream.all_readers) + len(stream.writers)


@pytest.mark.parametrize("part", ["writers", "parameters", "norms"])
def test_a_part_that_is_not_rotated_would_show(part: str) -> None:
    graph_module = traced("class token")
    exact = logits(graph_module)
    [stream] = streams(graph_module).found
    fold_norms_(graph_module, stream)
    getattr(stream, part).popitem()
    rotate_stream_(graph_module, stream, turn(stream.width))
    assert error(exact, logits(graph_module)) > 1e-2


def test_norms_that_are_not_folded_would_show() -> None:
    graph_module = traced("class token")
    exact = logits(graph_module)
    [stream] = streams(graph_module).found
    rotate_stream_(graph_module, stream, turn(stream.width))
    assert error(exact, logits(graph_module)) > 1e-2


def test_layer_scale_moves_into_the_layers_before_it() -> None:
    model = vit(init_values=0.1, depth=2).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.3 if name.endswith("gamma") else 0.1) * torch.randn(parameter.shape))
    graph_module = trace(model, SIZE)
    exact = logits(graph_module)
    [stream] = rotate(graph_module)
    assert sum(scale is not None for scale in stream.writers.values()) == 4
    assert error(exact, logits(graph_module)) < 1e-4
    assert all(torch.equal(p, torch.ones_like(p)) for n, p in parameters(graph_module).items() if n.endswith("gamma"))


@pytest.mark.parametrize(("kernel", "count"), [(1, 1), (3, 0)])
def test_convolutions_of_one_pixel_read_and_write_a_stream(kernel: int, count: int) -> None:
    torch.manual_seed(0)
    graph_module = trace(Hybrid(kernel).eval(), SIZE)
    exact = graph_module(IMAGES)
    assert len(rotate(graph_module)) == count
    assert error(exact, graph_module(IMAGES)) < 1e-4


class Odd(nn.Module):
    """A LayerNorm before a Linear, and something that stands in the way of a rotation."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.embed, self.norm = nn.Linear(48, 12), nn.LayerNorm(12)
        self.head, self.tail = nn.Linear(24 if what == "beside" else 12, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.mean(3).flatten(1)[:, :48])
        norm = self.norm(x)
        if self.what == "sum":
            return self.head(x + norm)
        if self.what == "beside":
            return self.head(torch.cat([x, x], 1)) + self.tail(norm)
        if self.what == "relu":
            return self.head(norm) + x.relu()[:, :5]
        return self.head(norm) + x.reshape(-1, 3, 4).sum(1)[:, :1]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("sum", "aten.add reads a norm"),
        ("beside", "more channels are put beside its own"),
        ("relu", "aten.relu reads it"),
        ("groups", "aten.sum reads some of its channels"),
    ],
)
def test_what_cannot_be_rotated_is_counted_with_its_reason(what: str, reason: str) -> None:
    graph_module = trace(Odd(what).eval(), SIZE)
    assert streams(graph_module).found == []
    [(found, count)] = streams(graph_module).left.items()
    assert count == 1
    assert found == reason or (what == "beside" and found == "aten.add reads a norm")


def test_without_a_bias_for_its_shift_a_norm_stays_as_it_is() -> None:
    model = copy.deepcopy(vit()).eval()
    model.blocks[0].attn.qkv.bias = None  # type: ignore[index]
    graph_module = trace(model, SIZE)
    exact = logits(graph_module)
    found = streams(graph_module)
    assert found.found == []
    assert found.left == {"a layer without a bias reads a norm that has one": 3}
    assert rotate(graph_module) == []
    assert torch.equal(exact, logits(graph_module))


def test_a_weight_that_another_layer_shares_stays_as_it_is() -> None:
    model = copy.deepcopy(vit(depth=2)).eval()
    model.blocks[0].mlp.fc2.weight = model.blocks[1].mlp.fc2.weight  # type: ignore[index]
    graph_module = trace(model, SIZE)
    assert streams(graph_module).left == {"a layer that writes it shares its weight": 5}


@pytest.mark.parametrize("name", [name for name in VITS if name != "convolutions"])
def test_heads_are_rotated_exactly(name: str) -> None:
    graph_module = traced(name)
    scale_after_scores_(graph_module)
    exact, count = logits(graph_module), 0
    for attention in attentions(graph_module):
        before = parameters(graph_module)
        turned = torch.stack([turn(4, seed, keep_ones=False) for seed in range(3)])  # 12 channels of 3 heads
        if attention.v and attention.output:
            rotate_values_(graph_module, attention, turned)
            count += 1
        if attention.q and attention.k:
            rotate_scores_(graph_module, attention, turned)
            count += 1
        assert error(exact, logits(graph_module)) < 1e-4
        assert any(not torch.allclose(p, before[n]) for n, p in parameters(graph_module).items())
    assert count


def test_half_a_rotation_of_a_head_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = traced("class token")
    exact, attention = logits(graph_module), attentions(graph_module)[0]
    assert attention.v
    heads, width = attention.v.index.shape
    turned = torch.stack([turn(width, seed, keep_ones=False) for seed in range(heads)])
    monkeypatch.setattr("martlet.graph.rewrite.rotate._rotate_rows_", lambda *_: None)
    rotate_values_(graph_module, attention, turned)
    assert error(exact, logits(graph_module)) > 1e-3


@pytest.mark.parametrize("matrix", [2 * turn(12), turn(12, keep_ones=False), turn(16)])
def test_what_is_no_rotation_that_keeps_the_ones_is_refused(matrix: Tensor) -> None:
    graph_module = traced("class token")
    [stream] = streams(graph_module).found
    with pytest.raises(ValueError, match="rotation"):
        rotate_stream_(graph_module, stream, matrix)


def test_covariances_are_those_of_the_norms_outputs_and_a_klt_rotation_evens_them() -> None:
    graph_module = traced("no class token")
    [stream] = streams(graph_module).found
    fold_norms_(graph_module, stream)
    first, seen = next(iter(stream.norms)), covariances(graph_module, list(stream.norms), IMAGES, silent)
    assert first.target is aten.layer_norm.default
    with torch.no_grad():
        block = vit_until_first_norm(graph_module, first)
    expected = torch.cov(block.flatten(0, -2).double().T, correction=0)
    assert torch.allclose(seen[first], expected, atol=1e-9)
    together = torch.stack(list(seen.values())).sum(0)
    rotate_stream_(
        graph_module, stream, rotation(klt_basis(together, keep_ones=True), torch.Generator().manual_seed(0))
    )
    after = torch.stack(list(covariances(graph_module, list(stream.norms), IMAGES, silent).values())).sum(0)
    assert variance_spread(after.diagonal()) < 1.001 < variance_spread(together.diagonal())


def vit_until_first_norm(graph_module: GraphModule, norm) -> Tensor:
    found: list[Tensor] = []

    class Stop(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n is norm:
                found.append(value)
            return value

    Stop(graph_module).run(IMAGES)
    return found[0]
