"""Q-HyViT (arXiv 2303.12557): which grid a convolution's input gets, in plain Python, and what bridges gain."""

import functools
import math

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.core import pipeline
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Stage, silent
from martlet.data.preprocess import Preprocess
from martlet.functional.quantize.hessian_search import FACTORS
from martlet.graph import sensitivity
from martlet.graph.fit import Call, Fitted, fit
from martlet.graph.hessian_guided import as_quantizer, symmetric_grids
from martlet.graph.segments import bridges
from martlet.graph.sites import sites
from martlet.graph.trace import trace
from martlet.nn.quantizers import TableQuantizer
from martlet.techniques.quantize.q_hyvit import FEW_FACTORS, QHyViT

BITS, CHANNELS, SIZE = 4, 6, (16, 16)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Hybrid(nn.Module):
    """Convolutions, a block of both with a way around it, convolutions, and attention behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.local = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.attention = Attention(16, 2, qkv_bias=True)
        self.fusion = nn.Conv2d(32, 16, 1)
        self.down = nn.Conv2d(16, 16, 3, 2, 1)
        self.last = Attention(16, 2, qkv_bias=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.local(x))
        tokens = y.flatten(2).mT
        tokens = tokens + self.attention(tokens)
        y = tokens.mT.reshape(y.shape)
        x = torch.relu(self.down(torch.relu(self.fusion(torch.cat([x, y], 1)))))
        tokens = x.flatten(2).mT
        return self.head((tokens + self.last(tokens)).mean(1))


@functools.cache
def hybrid() -> Model:
    torch.manual_seed(0)
    model = Model(
        module=Hybrid().eval(),
        num_classes=5,
        name="hybrid",
        origin={"source": "test", "weights": "random"},
        preprocess=Preprocess(size=SIZE, resize=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    )
    pipeline.enter_(model, Stage.GRAPH)
    return model


class Images:
    num_images = 12

    def __iter__(self):
        yield draw(12, 3, *SIZE, seed=3) * torch.linspace(0.2, 2, 3)[:, None, None]


def compress(**settings: object) -> Model:
    technique = QHyViT(**({"weight_bits": BITS, "activation_bits": BITS} | settings))  # type: ignore[arg-type]
    return pipeline.run(hybrid().copy(), Recipe((technique,)), Context(images=Images(), seed=1))


def test_bridges_are_where_convolutions_and_attention_meet() -> None:
    graph = hybrid().module
    assert isinstance(graph, GraphModule)
    both, joined = bridges(graph)
    assert (both.names[0], both.names[-1]) == ("local", "fusion")
    assert len(both.names) == 6
    assert (joined.names[0], joined.names[-1]) == ("down", "head")


def call_of(depthwise: bool) -> tuple[Call, Tensor, Tensor]:
    """A convolution behind another one, its weight, and a sample of gradients."""
    groups = CHANNELS if depthwise else 1
    convolution = nn.Sequential(nn.Identity(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=groups, bias=False))
    first = nn.Conv2d(3, CHANNELS, 1)
    torch.manual_seed(2)
    with torch.no_grad():
        first.weight *= torch.tensor([1.0, 0.01, 8.0, 1.0, 0.1, 3.0])[:, None, None, None]
    graph = trace(nn.Sequential(first, convolution).eval(), (6, 6))
    calls = []
    graph.requires_grad_(False)
    site = list(sites(graph))[1]
    fit(graph, [site], draw(2, 3, 6, 6, seed=1), lambda call: calls.append(call) or Fitted({}), False, silent)
    gradient = draw(*sensitivity.sample(calls[0].output, 2, False).shape, seed=5) ** 3
    return calls[0], calls[0].weight.detach(), gradient


def oracle(call: Call, weight: Tensor, gradient: Tensor, depthwise: bool) -> tuple[str, float]:
    """Granularity, scheme and factor of the least Σ g² (conv(x̂) - conv(x))², and that error; one number at a time."""
    x = call.operands[0].value.double()
    best = ("", math.inf)
    for granularity in ("layer", "channel") if depthwise else ("layer",):
        parts = [x] if granularity == "layer" else list(x.unbind(1))
        for scheme in ("symmetric", "asymmetric"):
            for factor in (1.0, *FEW_FACTORS):
                rounded = []
                for part in parts:
                    values = part.flatten().tolist()
                    low, high = min(*values, 0.0), max(*values, 0.0)
                    if scheme == "symmetric":
                        cover, zero = max(-low, high) / (2 ** (BITS - 1) - 0.5), 2 ** (BITS - 1)
                    else:
                        cover = (high - low) / (2**BITS - 1)
                        zero = round(-low / cover)
                    step = cover * factor
                    rounded.append(
                        torch.tensor(
                            [(min(max(round(v / step) + zero, 0), 2**BITS - 1) - zero) * step for v in values],
                            dtype=torch.float64,
                        ).reshape(part.shape)
                    )
                now = rounded[0] if granularity == "layer" else torch.stack(rounded, 1)
                groups = CHANNELS if depthwise else 1
                moved = nn.functional.conv2d(now - x, weight.double(), padding=1, groups=groups)
                error = float((sensitivity.sample(moved, 2, False) * gradient.double()).square().sum())
                if error < best[1] * (1 - 1e-9):
                    best = (f"{granularity} {scheme} {factor:.4f}", error)
    return best


@pytest.mark.parametrize("depthwise", [True, False])
def test_a_convolutions_grid_is_the_best_of_all(depthwise: bool) -> None:
    call, weight, gradient = call_of(depthwise)
    technique = QHyViT(weight_bits=BITS, activation_bits=BITS)
    label, least = oracle(call, weight, gradient, depthwise)
    quantizer = technique.convolution(call, gradient, 2).operands[0]
    assert label.startswith("channel" if depthwise else "layer")
    assert (isinstance(quantizer, TableQuantizer) and quantizer.scale.ndim == 1) == depthwise

    def error(other: nn.Module) -> float:
        moved = call.multiply({0: other(call.operands[0].value)}) - call.output
        return float((sensitivity.sample(moved, 2, False) * gradient).square().sum())

    assert error(quantizer) == pytest.approx(least, rel=1e-3)
    [covering, *_] = symmetric_grids(call.operands[0].value, BITS, ())
    assert error(as_quantizer(covering)) > 1.01 * least  # the comparison can fail
    assert oracle(call, weight, gradient.flip(0), depthwise)[1] != pytest.approx(least, rel=1e-3)


def test_both_schemes_are_tried_with_a_linear_too() -> None:
    graph = hybrid().module
    assert isinstance(graph, GraphModule)
    kept = {}
    found = [site for site in sites(graph) if site.name == "head"]
    fit(graph, found, next(iter(Images())), lambda call: kept.update(call.operands) or Fitted({}), False, silent)
    grids = QHyViT(activation_bits=BITS).grids(kept[0])
    assert len(grids) == 2 * (len(FACTORS) + 1)
    assert {grid.zero_point for grid in grids[: len(FACTORS) + 1]} == {2 ** (BITS - 1)}
    low, high = (float(v) for v in kept[0].value.aminmax())
    whole = grids[len(FACTORS) + 1]
    assert whole.scale * (2**BITS - 1) == pytest.approx(max(high, 0) - min(low, 0))


def test_a_bridges_scales_are_what_its_output_asks_for() -> None:
    with_, without = compress(), compress(bridge=False)
    record = with_.steps[-1].record
    assert [bridge["layers"][0] for bridge in record["bridges"]] == ["local", "down"]
    ratios = [bridge["loss_ratio"] for bridge in record["bridges"]]
    assert max(ratios) <= 1
    assert min(ratios) < 0.9
    assert "bridges" not in without.steps[-1].record
    changed = {
        name
        for name, tensor in with_.module.state_dict().items()
        if not torch.equal(tensor, without.module.state_dict()[name])
    }
    assert changed
    assert all(name.endswith("scale") and "weight" not in name for name in changed)
