"""Layer norms folded into the Linears after them, exactly, and only where nothing else reads them."""

import copy

import pytest
import torch
from small_vits import VITS, logits, traced
from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.graph.rewrite.fold import fold_layer_norms_
from martlet.graph.trace import capture

aten = torch.ops.aten


def doubled(graph_module: GraphModule) -> GraphModule:
    return copy.deepcopy(graph_module).double()


def affine_norms(graph_module: GraphModule) -> int:
    norms = graph_module.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    return sum(any(a is not None for a in norm.args[2:4]) for norm in norms)


@pytest.mark.parametrize("name", VITS)
def test_the_logits_stay_and_the_scales_are_gone(name):
    graph_module = doubled(traced(name))
    expected, before = logits(graph_module), affine_norms(graph_module)
    folded = fold_layer_norms_(graph_module)
    assert folded >= 2
    assert affine_norms(graph_module) == before - folded
    torch.testing.assert_close(logits(graph_module), expected, rtol=1e-12, atol=1e-12)


def test_a_fold_that_forgets_the_shift_is_seen():
    graph_module = doubled(traced("class token"))
    expected = logits(graph_module)
    for name, parameter in graph_module.named_parameters():
        if name.endswith("norm1.bias"):
            parameter.data.zero_()
    fold_layer_norms_(graph_module)
    assert (logits(graph_module) - expected).norm() > 1e-3 * expected.norm()


class Norms(nn.Module):
    """Two norms that a Linear reads, one of them without a bias, and four that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.unbiased, self.last = nn.LayerNorm(6, bias=False), nn.Linear(6, 6)
        self.plain, self.read_twice, self.summed, self.both = (nn.LayerNorm(6) for _ in range(4))
        self.planes = nn.LayerNorm([4, 6])
        self.first = nn.Linear(6, 6, bias=False)
        self.shared = nn.Linear(6, 6)
        self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.plain(x))
        x = x + self.shared(self.read_twice(x)) + self.shared(x)
        y = self.summed(x)
        x = self.second(y) + y
        return self.last(self.unbiased(self.third(self.planes(self.both(x))))).sum(1)


def test_norms_that_something_else_reads_stay():
    torch.manual_seed(0)
    module = Norms().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    graph_module = capture(module, x)
    assert fold_layer_norms_(graph_module) == 2
    assert affine_norms(graph_module) == 4
    assert "first.bias" in dict(graph_module.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(graph_module(x), module(x), rtol=1e-12, atol=1e-12)
