"""Errors of layers, by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from martlet.core.model import Model
from martlet.data.preprocess import Preprocess
from martlet.measure.layers import align, layer_errors, sqnr_db

SIZE = (6, 6)


class Net(nn.Module):
    """A convolution, an attention over its places without projections, two Linears; the second may be missing."""

    def __init__(self, last: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=3)  # 2 x 2
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 5) if last else nn.Identity()

    def layers(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The output of every multiplication, by the name that reports give it."""
        stem = self.stem(x)
        tokens = stem.flatten(2).mT
        scores = tokens * 4**-0.5 @ tokens.mT
        values = scores.softmax(-1) @ tokens
        first = self.first(values)
        outputs = {"stem": stem, ".scores": scores, ".values": values, "first": first}
        return outputs | ({"last": self.last(first.relu())} if isinstance(self.last, nn.Linear) else {})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x).flatten(2).mT
        values = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.last(self.first(values).relu()).mean(1)


def model(module: nn.Module) -> Model:
    return Model(name="net", module=module.eval(), preprocess=Preprocess(size=SIZE), num_classes=5, origin={})


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(7, 3, *SIZE)


def test_sqnr_by_hand():
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)  # 25 over 0.25
    assert sqnr_db(torch.tensor([1.0]), torch.tensor([2.0])) == pytest.approx(0.0)
    assert sqnr_db(torch.ones(4), torch.full((4,), 1.1)) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db(torch.ones(2), torch.ones(2)) == math.inf
    assert sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf
    assert sqnr_db(torch.zeros(2), torch.zeros(2)) == math.inf


def oracle(reference: torch.Tensor, test: torch.Tensor, channels: tuple[int, ...]) -> float:
    """Channel by channel, with NumPy's fit of a line."""
    exact, rough = (x.movedim(channels, [*range(len(channels))]) if channels else x[None] for x in (reference, test))
    fitted = [
        torch.tensor(np.polyval(np.polyfit(b.flatten(), a.flatten(), 1), b)) for a, b in zip(exact, rough, strict=True)
    ]
    reference, test = exact, torch.stack(fitted)
    signal = sum(a * a for a in reference.flatten().tolist())
    noise = sum((a - b) ** 2 for a, b in zip(reference.flatten().tolist(), test.flatten().tolist(), strict=True))
    return 10 * math.log10(signal / noise)


def test_each_layer_is_fed_by_its_own_predecessors(net, images):
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.stem.weight.add_(0.05 * torch.randn(other.stem.weight.shape))
        other.first.bias.add_(0.1)
        exact, rough = net.layers(images), other.layers(images)
    found = layer_errors(model(net), model(other), images)
    assert [layer["kind"] for layer in found] == ["conv", "scores", "values", "linear", "linear"]
    channels = {"stem": (1,), ".scores": (), ".values": (2,)}
    for layer, (name, value) in zip(found, exact.items(), strict=True):
        assert layer["name"].endswith(name)
        expected = oracle(value, rough[name], channels.get(name, (2,)))
        assert layer["sqnr_db"] == pytest.approx(expected, abs=0.02)
    with torch.no_grad():  # fed by the untouched model's layers, the last would be exact
        assert torch.equal(other.last(exact["first"].relu()), exact["last"])
    assert found[-1]["sqnr_db"] < 40


def test_layers_that_are_equal_have_no_error_to_show(net, images):
    assert layer_errors(model(net), model(copy.deepcopy(net)), images) == []
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.last.weight[0, 0] += 0.1  # type: ignore[index]
    assert [layer["name"] for layer in layer_errors(model(net), model(other), images)] == ["last"]


def test_layers_that_only_one_has_or_of_another_shape_are_left_out(net, images):
    other = Net(last=False)
    narrow = copy.deepcopy(other)
    narrow.first = nn.Linear(4, 3)
    assert [layer["name"].rpartition(".")[2] for layer in layer_errors(model(net), model(other), images)] == [
        "stem",
        "scores",
        "values",
        "first",
    ]
    assert "first" not in {layer["name"] for layer in layer_errors(model(net), model(narrow), images)}


def test_a_scale_and_an_offset_of_channels_is_no_error():
    exact = torch.randn(50, 3, 70, 4)
    noise = 0.1 * torch.randn(exact.shape)
    moved = (exact + noise) * torch.rand(3, 1, 4).add(0.5) + torch.randn(3, 1, 4)
    assert sqnr_db(exact, align(exact, moved, (1, -1))) == pytest.approx(20, abs=0.5)
    assert sqnr_db(exact, align(exact, moved, (1,))) < 15  # channels of the last axis differ
    assert sqnr_db(exact, align(exact, torch.zeros(exact.shape), (1, -1))) == pytest.approx(0, abs=0.5)
