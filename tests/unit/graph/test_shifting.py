"""Centring keeps the logits, leaves no channel off centre, and leaves alone what can't take up the shift."""

import pytest
import torch
from small_vits import SIZE, Noise, traced, vit
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor
from torch.fx import GraphModule

from martlet.core.technique import silent
from martlet.graph.attention import attentions
from martlet.graph.observe import observe
from martlet.graph.rewrite import layout, shifting
from martlet.graph.rewrite.shifting import shift_
from martlet.graph.trace import trace


class Images(Noise):
    """In float64."""

    def __iter__(self):
        yield from (batch.double() for batch in super().__iter__())


def prepared(name: str) -> GraphModule:
    graph_module = traced(name).double()
    layout.split_projections_(graph_module)
    layout.scale_after_scores_(graph_module)
    return graph_module


def outputs(graph_module: GraphModule) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and every LayerNorm's and Linear's output over all images, (rows, channels)."""
    seen: dict[str, list[Tensor]] = {}
    nodes = [n for n in graph_module.graph.nodes if n.name.startswith(("layer_norm", "linear"))]
    watch = {n: (lambda value, n=n: seen.setdefault(n.name, []).append(value.flatten(0, -2))) for n in nodes}
    observe(graph_module, Images(), watch, silent, "test")
    logits = torch.cat([graph_module(batch)[0] for batch in Images()])
    return logits.detach(), {name: torch.cat(values) for name, values in seen.items()}


def error(first: Tensor, second: Tensor) -> float:
    return ((first - second).norm() / first.norm()).item()


@pytest.mark.parametrize(("name", "count"), [("class token", 3), ("no class token", 10), ("registers and qk-norm", 3)])
def test_logits_stay_and_channels_are_centred(name: str, count: int) -> None:
    graph_module = prepared(name)
    before, _ = outputs(graph_module)
    norms = [node.name for node in shifting.norms_before_linears(graph_module)]
    values = [(a.v.linear.name, a.v.index.flatten()) for a in attentions(graph_module) if a.v]
    assert shift_(graph_module, Images(), silent) == count == len(norms) + len(values)
    after, seen = outputs(graph_module)
    assert error(before, after) < 1e-12
    for norm in norms:
        assert (seen[norm].amin(0) + seen[norm].amax(0)).abs().max() < 1e-9
    for linear, rows in values:
        assert seen[linear][:, rows].mean(0).abs().max() < 1e-9
        assert seen[linear].mean(0).abs().max() > 1e-3  # q and k aren't touched


def test_a_shift_that_nothing_takes_up_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    graph_module = prepared("class token")
    before, _ = outputs(graph_module)
    monkeypatch.setattr(shifting, "_absorb_", lambda *arguments: None)
    shift_(graph_module, Images(), silent)
    assert error(before, outputs(graph_module)[0]) > 1e-2


def test_without_biases_only_what_has_one_is_centred() -> None:
    graph_module = trace(vit(qkv_bias=False).eval(), SIZE).requires_grad_(False).double()
    layout.split_projections_(graph_module)
    before, _ = outputs(graph_module)
    assert shift_(graph_module, Images(), silent) == 1  # before the MLP
    assert error(before, outputs(graph_module)[0]) < 1e-12


def test_windows_with_masks_keep_their_logits() -> None:
    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 6, "depths": (2, 1), "num_heads": (3, 2), "window_size": 4}
    swin = SwinTransformer(**sizes, num_classes=5)  # type: ignore[arg-type]
    graph_module = trace(swin.eval(), SIZE).requires_grad_(False)
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.softmax.int:
            node.args = node.args[:2]
    graph_module.recompile()
    graph_module.double()
    layout.split_projections_(graph_module)
    layout.flatten_masks_(graph_module)
    before, _ = outputs(graph_module)
    assert shift_(graph_module, Images(), silent) > 3
    assert error(before, outputs(graph_module)[0]) < 1e-12
