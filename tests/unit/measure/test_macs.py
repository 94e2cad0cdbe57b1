import pytest
import timm
import torch
from torch import nn

from martlet.core.model import Model
from martlet.data.preprocess import Preprocess
from martlet.graph.trace import example_values, trace
from martlet.measure.macs import macs, macs_by_node


def count(module: nn.Module, size: tuple[int, int]) -> int:
    return macs(Model(name="m", module=module, preprocess=Preprocess(size=size), num_classes=1, origin={}))


class Layer(nn.Module):
    """Images of 3 x 8 x 8 through one layer."""

    def __init__(self, layer: nn.Module, tokens: bool = False) -> None:
        super().__init__()
        self.layer, self.tokens = layer, tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(2) if self.tokens else x).flatten(1)


@pytest.mark.parametrize(
    ("layer", "tokens", "expected"),
    [
        (nn.Linear(64, 5), True, 3 * 64 * 5),
        (nn.Conv2d(3, 6, 3), False, 6 * 6 * 6 * 3 * 9),
        (nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), False, 4 * 4 * 6 * 1 * 9),
        (nn.Conv2d(3, 6, 3, dilation=2), False, 4 * 4 * 6 * 3 * 9),
        (nn.Conv1d(3, 4, 5, padding=2), True, 64 * 4 * 3 * 5),
        (nn.ConvTranspose2d(3, 6, 2, stride=2), False, 8 * 8 * 3 * 6 * 4),
        (nn.LayerNorm(8), False, 0),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), False, 0),
    ],
)
def test_layers_by_hand(layer, tokens, expected):
    assert count(Layer(layer, tokens), (8, 8)) == expected


class Products(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Parameter(torch.randn(64, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)  # (B, 3, 64)
        if self.kind == "einsum":
            x = torch.einsum("bnc,bmc->bnm", x, x)
        elif self.kind == "bmm":
            x = torch.bmm(x, x.transpose(1, 2))
        elif self.kind == "baddbmm":
            x = torch.baddbmm(torch.zeros(1, 3, 3), x, x.transpose(1, 2))
        elif self.kind == "attention":
            x = nn.functional.scaled_dot_product_attention(x, x, x)
        elif self.kind == "table":
            x = x @ self.table
        elif self.kind == "constant":
            x = x + (self.table.T @ self.table).sum()
        return x.flatten(1)


@pytest.mark.parametrize(
    ("kind", "expected", "attention"),
    [
        ("einsum", 3 * 3 * 64, True),
        ("bmm", 3 * 3 * 64, True),
        ("baddbmm", 3 * 3 * 64, True),
        ("attention", 2 * 3 * 3 * 64, True),
        ("table", 3 * 64 * 7, False),
        ("constant", 0, False),  # computed once, not per image
    ],
)
def test_products_by_hand(kind, expected, attention):
    graph = trace(Products(kind), (8, 8))
    found = macs_by_node(graph, example_values(graph, (8, 8)))
    assert sum(node.macs for node in found.values()) == expected
    assert any(node.attention for node in found.values()) == attention


def test_deit_tiny_with_attention_written_out():
    model = timm.create_model("deit_tiny_patch16_224")
    n, c, layers = 197, 192, 12
    by_hand = 196 * 768 * c + layers * (12 * n * c * c + 2 * n * n * c) + 1000 * c
    assert count(model, (224, 224)) == by_hand
    assert by_hand / 1e9 == pytest.approx(1.254, abs=1e-3)
