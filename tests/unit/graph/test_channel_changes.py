"""Changes of channels between a LayerNorm and the Linears that read it: exact, whole, and counted."""

import copy

import pytest
import torch
from small_vits import SIZE, VITS, Noise, error, logits, traced, vit
from torch import Tensor, nn

from martlet.functional.quantize.percentile import percentile_scales
from martlet.functional.quantize.reparameterize import ChannelChange, reparameterize_scales, smooth_with_bias
from martlet.graph.rewrite.reparameterize import reparameterize_
from martlet.graph.trace import trace

IMAGES = torch.cat(list(Noise()))


def to_mean_scale(rows: Tensor, weights) -> ChannelChange:
    return reparameterize_scales(*percentile_scales(rows.T, 4))


def smooth(rows: Tensor, weights) -> ChannelChange:
    return smooth_with_bias(rows, torch.cat(list(weights)).abs().amax(0))


def random_change(rows: Tensor, weights) -> ChannelChange:
    generator = torch.Generator().manual_seed(1)
    ratio = torch.rand(rows.shape[1], generator=generator) * 3 + 0.2
    return ChannelChange(ratio, torch.randn(rows.shape[1], generator=generator))


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("change", [to_mean_scale, smooth, random_change])
def test_logits_stay_the_same_to_1e_4(name: str, change) -> None:
    graph_module = traced(name)
    exact, before = logits(graph_module), parameters(graph_module)
    counts = reparameterize_(graph_module, IMAGES, change)
    assert counts["reparameterized"] == counts["layer_norms"] > 1
    assert error(exact, logits(graph_module)) < 1e-4
    moved = {n for n, p in parameters(graph_module).items() if not torch.allclose(p, before[n])}
    assert len(moved) >= 4 * counts["reparameterized"]  # weight and bias of each norm and of a Linear behind it


@pytest.mark.parametrize("part", ["into_norm", "into_linear"])
def test_half_a_change_would_show(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setattr(ChannelChange, part, lambda self, weight, bias: (weight, bias))
    graph_module = traced("class token")
    exact = logits(graph_module)
    reparameterize_(graph_module, IMAGES, random_change)
    assert error(exact, logits(graph_module)) > 1e-2


def test_the_change_is_told_each_norms_output_and_the_weights_that_read_it() -> None:
    model = vit(depth=3, class_token=False, global_pool="avg").eval()
    graph_module, told = trace(model, SIZE), []

    def change(rows: Tensor, weights) -> ChannelChange:
        told.append((rows, [w.clone() for w in weights]))
        return ChannelChange(torch.ones(rows.shape[1]), torch.zeros(rows.shape[1]))

    counts = reparameterize_(graph_module, IMAGES, change)
    assert counts == {"reparameterized": 7, "layer_norms": 7}  # two a block, and that of the head behind the mean
    state = model.state_dict()
    with torch.no_grad():
        first = model.blocks[0].norm1(model.norm_pre(model._pos_embed(model.patch_embed(IMAGES))))  # type: ignore[index]
    assert torch.allclose(told[0][0], first.flatten(0, -2), atol=1e-5)
    assert torch.equal(told[0][1][0], state["blocks.0.attn.qkv.weight"])
    assert torch.equal(told[-1][1][0], state["head.weight"])


def test_one_norm_before_three_linears_is_changed_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(48)
            self.linears = nn.ModuleList(nn.Linear(48, n) for n in (5, 7, 9))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x.mean(3).flatten(1))
            return torch.cat([linear(x) for linear in self.linears], 1)

    graph_module = trace(Shared().eval(), SIZE)
    exact = graph_module(IMAGES)
    sizes = []
    counts = reparameterize_(
        graph_module, IMAGES, lambda rows, weights: sizes.append([len(w) for w in weights]) or to_mean_scale(rows, [])
    )
    assert counts == {"reparameterized": 1, "layer_norms": 1}
    assert sizes == [[5, 7, 9]]
    assert torch.allclose(graph_module(IMAGES), exact, atol=1e-4)


@pytest.mark.parametrize("missing", ["blocks.0.norm1.bias", "blocks.0.attn.qkv.bias"])
def test_a_missing_bias_is_skipped_and_counted(missing: str) -> None:
    model = copy.deepcopy(vit()).eval()
    owner, _, leaf = missing.rpartition(".")
    setattr(model.get_submodule(owner), leaf, None)
    graph_module = trace(model, SIZE)
    exact, before = logits(graph_module), parameters(graph_module)
    assert reparameterize_(graph_module, IMAGES, random_change) == {"reparameterized": 1, "layer_norms": 2}
    assert error(exact, logits(graph_module)) < 1e-4
    after = parameters(graph_module)
    assert all(torch.equal(after[name], before[name]) for name in ("blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"))
    assert not torch.equal(after["blocks.0.norm2.weight"], before["blocks.0.norm2.weight"])


def test_without_layer_norms_nothing_happens() -> None:
    graph_module = traced("convolutions")
    exact = logits(graph_module)
    assert reparameterize_(graph_module, IMAGES, random_change) == {"reparameterized": 0, "layer_norms": 0}
    assert torch.equal(exact, logits(graph_module))
