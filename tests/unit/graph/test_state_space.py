"""Pairs of layers and gates: which are found, that rotating them is exact, and what stays as it is."""

import copy
import functools

import pytest
import torch
from small_vits import SIZE, Noise, error
from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.core.technique import silent
from martlet.functional.quantize.rotation import rotation
from martlet.graph.rewrite.rotate import covariances, is_turn, rotate_gate_, rotate_pair_, smooth_gate_
from martlet.graph.sites import sites
from martlet.graph.state_space import gates, pairs
from martlet.graph.trace import trace

IMAGES = torch.cat(list(Noise()))
WIDTH, RANK, STATES = 12, 4, 2


def turn(size: int, seed: int = 0) -> Tensor:
    return rotation(torch.eye(size), torch.Generator().manual_seed(seed))


class Mixer(nn.Module):
    """What Mamba does to tokens (B, N, C), without its scan: a low-rank Δ beside B and C, a norm and a gate.

    what: the one thing that is unlike Mamba.
    """

    def __init__(self, what: str = "", groups: int = 0) -> None:
        super().__init__()
        self.what, self.groups = what, groups
        self.embed = nn.Linear(48, 2 * WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        if groups:
            self.x_proj = nn.Parameter(torch.randn(groups, RANK + 2 * STATES, WIDTH))
            self.dt_proj = nn.Parameter(torch.randn(groups, WIDTH, RANK))
        else:
            self.x_proj, self.dt_proj = nn.Linear(WIDTH, RANK + 2 * STATES), nn.Linear(RANK, WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        tokens = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x, gate = self.embed(tokens).chunk(2, -1)
        y = self._grouped(x) if self.groups else self._plain(x)
        y = self.norm(y)
        if self.what == "norm read twice":
            return self.head(y * gate.sigmoid()).mean(1) + y.mean((1, 2))[:, None]
        if self.what == "scale for all tokens":
            return self.head(y * gate.sigmoid().mean(1, keepdim=True)).mean(1)
        return self.head(y * gate.sigmoid()).mean(1)

    def _plain(self, x: Tensor) -> Tensor:
        dt, b, c = self.x_proj(x).split([RANK, STATES, STATES], -1)
        extra = dt.sum(-1, keepdim=True) if self.what == "Δ read twice" else 0
        dt = dt.relu() if self.what == "nonlinear" else dt
        if self.what == "other order":
            dt = dt.unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2)
        return self.dt_proj(dt) * x + (b * c).sum(-1, keepdim=True) + extra

    def _grouped(self, x: Tensor) -> Tensor:
        parts = x.mT.unsqueeze(1).expand(-1, self.groups, -1, -1)  # (B, G, C, N)
        dt, b, c = (self.x_proj @ parts).split([RANK, STATES, STATES], 2)
        y = (self.dt_proj @ dt) * parts + (b * c).sum(2, keepdim=True)
        return y.sum(1).mT


def traced(what: str = "", groups: int = 0) -> GraphModule:
    return copy.deepcopy(_trace(what, groups))


@functools.cache
def _trace(what: str, groups: int) -> GraphModule:
    torch.manual_seed(1)
    module = Mixer(what, groups).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return trace(module, SIZE).requires_grad_(False)


@pytest.mark.parametrize(("what", "groups"), [("", 0), ("", 3), ("other order", 0)])
def test_rotating_between_two_layers_is_exact(what: str, groups: int) -> None:
    graph_module = traced(what, groups)
    exact = graph_module(IMAGES)
    [pair] = pairs(graph_module)
    assert (pair.first.name, pair.second.name) == ("x_proj", "dt_proj")
    assert pair.index.tolist() == ([0, 2, 1, 3] if what == "other order" else [0, 1, 2, 3])
    assert pair.groups == ((groups,) if groups else ())
    one = turn(RANK) if not groups else torch.stack([turn(RANK, seed) for seed in range(groups)])
    before = covariances(graph_module, [pair.operand], IMAGES, silent, {pair.operand: pair.rows})[pair.operand]
    rotate_pair_(graph_module, pair, one)
    assert error(exact, graph_module(IMAGES)) < 1e-5
    after = covariances(graph_module, [pair.operand], IMAGES, silent, {pair.operand: pair.rows})[pair.operand]
    assert torch.allclose(after, one.mT @ before @ one, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, rtol=1e-2)


def test_a_pair_that_is_half_rotated_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = traced()
    exact = graph_module(IMAGES)
    [pair] = pairs(graph_module)
    first, second = pair.weights(graph_module)
    monkeypatch.setattr(type(pair), "weights", lambda *_: (first, second.clone()))
    rotate_pair_(graph_module, pair, turn(RANK))
    assert error(exact, graph_module(IMAGES)) > 1e-2


@pytest.mark.parametrize("what", ["Δ read twice", "nonlinear"])
def test_what_is_not_read_as_it_is_is_no_pair(what: str) -> None:
    assert pairs(traced(what)) == []


def test_a_shared_weight_is_in_no_pair() -> None:
    graph_module = traced()
    graph_module.get_submodule("head").weight = nn.Parameter(graph_module.get_parameter("x_proj.weight")[:5])
    assert pairs(graph_module) == []


@pytest.mark.parametrize("groups", [0, 3])
def test_a_gate_is_smoothed_and_rotated_exactly(groups: int) -> None:
    graph_module = traced(groups=groups)
    exact = graph_module(IMAGES)
    [gate] = gates(graph_module)
    assert gate.linear.args[1].target == "head.weight"  # type: ignore[union-attr]
    assert gate.norm is not None
    before = covariances(graph_module, [gate.product], IMAGES, silent)[gate.product]
    factors, one = torch.rand(WIDTH) + 0.5, turn(WIDTH)
    smooth_gate_(graph_module, gate, factors)
    assert error(exact, graph_module(IMAGES)) < 1e-5
    rotate_gate_(graph_module, gate, one)
    assert error(exact, graph_module(IMAGES)) < 1e-5
    [site] = [site for site in sites(graph_module) if is_turn(site)]
    assert gate.linear.args[0] is site.node
    after = covariances(graph_module, [site.node], IMAGES, silent)[site.node]
    change = one / factors[:, None].double()
    assert torch.allclose(after, change.T @ before @ change, rtol=1e-3, atol=1e-5)


def test_half_a_gate_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = traced()
    exact = graph_module(IMAGES)
    [gate] = gates(graph_module)
    monkeypatch.setattr("martlet.graph.rewrite.rotate._multiplied", lambda value, *_: value)
    rotate_gate_(graph_module, gate, turn(WIDTH))
    assert error(exact, graph_module(IMAGES)) > 1e-2


def test_a_norm_that_is_read_elsewhere_is_not_scaled() -> None:
    graph_module = traced("norm read twice")
    [gate] = gates(graph_module)
    assert gate.norm is None
    with pytest.raises(ValueError, match="no LayerNorm"):
        smooth_gate_(graph_module, gate, torch.ones(WIDTH))


def test_a_factor_for_all_tokens_is_no_gate() -> None:
    assert gates(traced("scale for all tokens")) == []


def test_what_is_no_rotation_is_refused() -> None:
    graph_module = traced()
    [pair], [gate] = pairs(graph_module), gates(graph_module)
    for matrix in (2 * turn(RANK), turn(RANK + 1), turn(RANK)[None]):
        with pytest.raises(ValueError, match="not a rotation"):
            rotate_pair_(graph_module, pair, matrix)
    with pytest.raises(ValueError, match="not a rotation"):
        rotate_gate_(graph_module, gate, turn(RANK))
