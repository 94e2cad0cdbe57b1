"""The walk that asks how each multiplication is rounded: whom, how often, and with which tensors."""

import pytest
import torch
from small_vits import MODELS, Noise, traced
from torch import Tensor, nn
from torch.fx import GraphModule

from martlet.core.kept import Kept
from martlet.core.technique import silent
from martlet.functional.quantize.search import AffineGrid
from martlet.graph.fit import Call, Fitted, fit, remembered, tensor_kind
from martlet.graph.low_bit import affine
from martlet.graph.rounding import insert_
from martlet.graph.sites import sites
from martlet.graph.trace import trace
from martlet.nn.quantizers import PackedWeightQuantizer


def images() -> Tensor:
    return torch.cat(list(Noise()))


def coarse(x: Tensor) -> AffineGrid:
    low, high = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
    scale = (high - low) / 7 or 1.0
    return AffineGrid(3, scale, round(-low / scale))


def coarse_weight(weight: Tensor) -> PackedWeightQuantizer:
    rows = weight.detach().flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-6) / 3
    return PackedWeightQuantizer((torch.round(rows / scale) + 4).to(torch.uint8), scale, 3, shape=weight.shape)


class Recorder:
    """Rounds everything to three bits, and keeps what it was shown."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, call: Call) -> Fitted:
        self.calls.append(call)
        operands = {position: affine(coarse(operand.value)) for position, operand in call.operands.items()}
        return Fitted(operands, None if call.weight is None else coarse_weight(call.weight))


def inputs_of(graph_module: GraphModule, x: Tensor) -> dict[str, dict[int, Tensor]]:
    """The operands of each multiplication of a graph, before their own quantizers."""
    found: dict[str, dict[int, Tensor]] = {}
    by_node = {site.node: site for site in sites(graph_module)}

    class Walk(torch.fx.Interpreter):
        def run_node(self, n):
            if n in by_node:
                values = self.fetch_args_kwargs_from_env(n)[0]
                found[by_node[n].name] = {p: values[p] for p in by_node[n].activations}
            return super().run_node(n)

    with torch.no_grad():
        Walk(graph_module).run(x)
    return found


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_asked_once_in_order_with_its_operands(name: str, rounded: bool) -> None:
    graph_module, ask, told = traced(name), Recorder(), []
    found = list(sites(graph_module))
    fitted = fit(graph_module, found, images(), ask, rounded, lambda what, done, total: told.append((done, total)))
    assert [call.site for call in ask.calls] == found
    assert sum(len(call.operands) for call in ask.calls) == len(fitted.activations)
    assert [(node, position) for node, position, _ in fitted.weights] == [
        (site.node, site.weight) for site in found if site.weight is not None
    ]
    assert told[-1][0] == told[-1][1] == len(fitted.activations)
    for call in ask.calls:
        assert set(call.operands) <= set(call.site.activations)
        assert (call.weight is None) == call.site.is_attention
        for position, operand in call.operands.items():
            assert operand.kind == tensor_kind(call.site, position)
    kinds = {operand.kind for call in ask.calls for operand in call.operands.values()}
    expected = {"image", "layer_norm", "softmax", "gelu", "query", "key", "value", "other"}
    assert kinds == ({"image", "other"} if name == "convolutions" else expected)


@pytest.mark.parametrize("name", MODELS)
def test_without_rounding_everything_is_the_models_own(name: str) -> None:
    graph_module, ask = traced(name), Recorder()
    own = inputs_of(graph_module, images())
    fit(graph_module, list(sites(graph_module)), images(), ask, False, silent)
    assert {call.site.name for call in ask.calls} == own.keys()
    for call in ask.calls:
        for position, operand in call.operands.items():
            assert torch.equal(operand.value, own[call.site.name][position])


@pytest.mark.parametrize("name", MODELS)
def test_with_rounding_inputs_come_from_what_was_decided_before(name: str) -> None:
    """As they will be: in the graph into which all decisions are put, the same tensors arrive at the quantizers."""
    graph_module, ask = traced(name), Recorder()
    untouched = inputs_of(graph_module, images())
    found = list(sites(graph_module))
    fitted = fit(graph_module, found, images(), ask, True, silent)
    insert_(graph_module, fitted.activations, fitted.weights)
    arriving = inputs_of(graph_module, images())
    moved = 0
    for call in ask.calls:
        for position, operand in call.operands.items():
            expected = affine(coarse(operand.value))(operand.value)
            assert torch.allclose(arriving[call.site.name][position], expected, atol=1e-5), call.site.name
            moved += not torch.allclose(operand.value, untouched[call.site.name][position], atol=1e-3)
    assert moved >= len(fitted.activations) - 2  # all but the image, and what it alone gives


class Shared(nn.Module):
    """Three Linears that read one LayerNorm's output, two of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.first, self.second, self.third = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 48)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.mean(3).flatten(1))
        return self.first(x) + self.second(x).relu() + self.third(x).sigmoid()


@pytest.mark.parametrize("rounded", [False, True])
def test_a_shared_operand_and_a_shared_weight_are_decided_once(rounded: bool) -> None:
    graph_module, ask = trace(Shared().eval(), (16, 16)), Recorder()
    fitted = fit(graph_module, list(sites(graph_module)), images(), ask, rounded, silent)
    assert [len(call.operands) for call in ask.calls] == [1, 0, 0]
    [(one, _)] = fitted.activations.items()
    assert len(one.consumers) == 3
    [first, second, third] = [quantizer for _, _, quantizer in fitted.weights]
    assert first is third
    assert first is not second


def test_what_is_not_decided_stays_as_it_is() -> None:
    graph_module = traced("class token")
    nothing = lambda call: Fitted({})  # noqa: E731
    fitted = fit(graph_module, list(sites(graph_module)), images(), nothing, True, silent)
    assert (fitted.activations, fitted.weights) == ({}, [])


def test_decisions_of_a_stopped_run_are_not_taken_again(tmp_path, monkeypatch) -> None:
    """Asked for what is left alone, and all comes out as in one run; another key begins anew."""
    monkeypatch.setattr("martlet.graph.fit.SAVE_SECONDS", 0.0)
    graph_module, kept = traced("class token"), Kept(tmp_path / "kept")
    found = list(sites(graph_module))
    whole = fit(graph_module, found, images(), Recorder(), True, silent)

    class StoppedError(Exception):
        pass

    def stop(call: Call) -> Fitted:
        if call.site is found[3]:
            raise StoppedError
        return Recorder()(call)

    with pytest.raises(StoppedError):
        fit(graph_module, found, images(), remembered(stop, kept, "one"), True, silent)
    rest = Recorder()
    again = fit(graph_module, found, images(), remembered(rest, kept, "one"), True, silent)
    assert [call.site for call in rest.calls] == found[3:]
    for a, b in zip(
        [*whole.activations.values(), *(q for _, _, q in whole.weights)],
        [*again.activations.values(), *(q for _, _, q in again.weights)],
        strict=True,
    ):
        assert a.structure() == b.structure()
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    other = Recorder()
    fit(graph_module, found, images(), remembered(other, kept, "another"), True, silent)
    assert [call.site for call in other.calls] == found
