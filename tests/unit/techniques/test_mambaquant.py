"""mambaquant: what its rotations do to channels, written slowly from the paper (arXiv 2501.13484), in float64."""

import functools
import json

import pytest
import torch
from tiny import MODELS, Smooth, compress, drawn, error, images, logits, model
from torch import Tensor
from torch.fx import GraphModule

from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, silent
from martlet.functional.quantize.rotation import variance_spread
from martlet.graph.attention import attentions
from martlet.graph.rewrite.layout import scale_after_scores_
from martlet.graph.rewrite.rotate import covariances, is_turn
from martlet.graph.sites import sites
from martlet.graph.state_space import gates, pairs
from martlet.graph.streams import streams
from martlet.models.efficientvmamba import EfficientVMamba
from martlet.techniques.quantize.mambaquant import MambaQuant

IMAGES = torch.cat(list(Smooth()))
ROTATED = {
    "class token": {"norms": 3, "values": 1, "scores": 1},
    "no class token, odd depth": {"norms": 7, "values": 3, "scores": 3},
    "registers and qk-norm": {"norms": 3, "values": 1, "scores": 0},
    "no biases": {"norms": 0, "values": 1, "scores": 1},
    "swin": {"norms": 3, "values": 3, "scores": 3},
}


def prepared(kind: str, *, klt: bool = True, smooth: bool = True) -> tuple[GraphModule, dict]:
    graph_module = model(kind).module
    assert isinstance(graph_module, GraphModule)
    return graph_module, MambaQuant(klt=klt, smooth=smooth).prepare_(
        graph_module, IMAGES, Context(images=Smooth(), seed=1)
    )


def variances(covariance: Tensor, index: Tensor) -> Tensor:
    return covariance.diagonal()[index]  # (H, D)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("settings", [{}, {"klt": False, "smooth": False}])
def test_logits_stay_the_same_and_the_record_says_what_was_rotated(kind: str, settings: dict[str, bool]) -> None:
    original = model(kind).module
    graph_module, record = prepared(kind, **settings)
    assert error(logits(original, images()), logits(graph_module, images())) < 1e-4
    assert record["rotated"] == ROTATED[kind] | {"pairs": 0, "gates": 0}
    assert record["attentions"] == ROTATED[kind]["values"]
    assert json.loads(json.dumps(record)) == record
    unread = sum(record["norms_left"].values())
    nodes = [n for n in graph_module.graph.nodes if "layer_norm" in str(n.target)]
    assert unread + ROTATED[kind]["norms"] == len(nodes)
    before, after = original.state_dict(), graph_module.state_dict()
    assert any(not torch.allclose(before[name], after[name], atol=1e-3) for name in before)


@pytest.mark.parametrize("kind", ["class token", "no class token, odd depth"])
def test_all_channels_of_a_stream_and_of_a_head_have_one_variance(kind: str) -> None:
    """H_K = K H gives channel j the variance Σ_i h_ij² λ_i, with h_ij² = 1 / C; without K it is whatever it is."""
    plain: list[float] = []
    for klt in (True, False):
        graph_module, _ = prepared(kind, klt=klt)
        [stream] = streams(graph_module).found
        heads = attentions(graph_module)
        linears = [a.v.linear for a in heads if a.v]
        seen = covariances(graph_module, [*stream.norms, *linears], IMAGES, silent)
        together = sum(seen[norm] / seen[norm].trace() for norm in stream.norms)
        assert isinstance(together, Tensor)
        spreads = [variance_spread(together.diagonal())]
        for attention in heads:
            assert attention.v
            spreads += [variance_spread(v) for v in variances(seen[attention.v.linear], attention.v.index)]
        if klt:
            eigenvalues = torch.linalg.eigvalsh(together)
            assert torch.allclose(together.diagonal(), eigenvalues.mean().expand(len(eigenvalues)), rtol=1e-4)
            assert max(spreads) < 1.001
        else:
            plain = spreads
    assert min(plain) > 1.01  # the comparison can fail


def test_queries_and_keys_have_equal_deviations_before_they_are_rotated() -> None:
    """Channel by channel up to a factor a head: s_j = √(σ(q_j) / σ(k_j)), over its geometric mean."""
    original = model("class token").module
    assert isinstance(original, GraphModule)
    scale_after_scores_(original)
    [attention] = attentions(original)
    assert attention.q
    assert attention.k
    linear, width = attention.q.linear, attention.q.index.shape[1]
    before = covariances(original, [linear], IMAGES, silent)[linear]
    for smooth in (True, False):
        graph_module, _ = prepared("class token", smooth=smooth)
        [rotated] = attentions(graph_module)
        assert rotated.q
        assert rotated.k
        after = covariances(graph_module, [rotated.q.linear], IMAGES, silent)[rotated.q.linear]
        for h in range(3):
            rows = [before[i][:, i] for i in (attention.q.index[h], attention.k.index[h])]
            deviations = [[float(c[j, j]) ** 0.5 for j in range(width)] for c in rows]
            s = [(a / b) ** 0.5 if smooth else 1.0 for a, b in zip(*deviations, strict=True)]
            mean = torch.tensor(s).log().mean().exp().item()
            for part, sign, covariance in ((rotated.q, -1, rows[0]), (rotated.k, 1, rows[1])):
                expected = sum(float(covariance[j, j]) * (s[j] / mean) ** (2 * sign) for j in range(width))
                found = float(variances(after, part.index)[h].sum())  # a rotation keeps the sum
                assert found == pytest.approx(expected, rel=1e-4)


def test_the_record_tells_how_uneven_channels_were() -> None:
    graph_module, record = prepared("no class token, odd depth")
    original = model("no class token, odd depth").module
    assert isinstance(original, GraphModule)
    for module, part in ((original, "before"), (graph_module, "after")):
        [stream] = streams(module).found
        seen = covariances(module, stream.norms, IMAGES, silent)
        found = [variance_spread(c.diagonal()) for c in seen.values()]
        assert record["variance_spread"][part] == pytest.approx(sum(found) / len(found), abs=2e-3)
    assert 1 <= record["variance_spread"]["after"] < record["variance_spread"]["before"]


def test_a_channel_that_stands_out_costs_less() -> None:
    original, x = model("class token"), images(8)
    with torch.no_grad():
        original.module.get_parameter("patch_embed.proj.weight")[5] *= 30
    exact = logits(original.module, x)
    bits = {"weight_bits": 8, "activation_bits": 4}
    rotated, plain = (compress(original, *which, **bits) for which in (("mambaquant",), ("uniform",)))
    assert error(exact, logits(rotated.module, x)) < 0.8 * error(exact, logits(plain.module, x))


def test_the_shipped_recipe_has_eight_bits() -> None:
    assert Recipe.load("mambaquant").passes[1] == MambaQuant(weight_bits=8, activation_bits=8, klt=True, smooth=True)


@functools.cache
def _mamba() -> Model:
    return drawn(lambda: EfficientVMamba(dim=32, depths=(1, 1), scans=1, states=2, num_classes=5), seed=3)


def mamba() -> Model:
    return _mamba().copy()


def prepared_mamba(**settings: bool) -> tuple[GraphModule, dict]:
    graph_module = mamba().module
    assert isinstance(graph_module, GraphModule)
    return graph_module, MambaQuant(**settings).prepare_(graph_module, IMAGES, Context(images=Smooth(), seed=1))


@pytest.mark.parametrize("settings", [{}, {"klt": False, "smooth": False}])
def test_a_state_space_model_keeps_its_logits(settings: dict[str, bool]) -> None:
    graph_module, record = prepared_mamba(**settings)
    assert error(logits(mamba().module, images()), logits(graph_module, images())) < 1e-4
    assert record["rotated"] == {"norms": 0, "values": 0, "scores": 0, "pairs": 1, "gates": 1}
    assert record["variance_spread"]["after"] < record["variance_spread"]["before"]


def test_channels_of_delta_have_one_variance() -> None:
    """Var_j = Σ_i h_ij² λ_i, with h_ij² = 1 / R; without the Karhunen-Loève basis they are what they are."""
    spreads = {}
    for klt in (True, False):
        graph_module, _ = prepared_mamba(klt=klt)
        pair, *_ = pairs(graph_module)  # what is turned while the model runs and its Linear are one too
        found = covariances(graph_module, [pair.operand], IMAGES, silent, {pair.operand: pair.rows})[pair.operand]
        assert found.shape == (4, 2, 2)
        spreads[klt] = [variance_spread(c.diagonal()) for c in found]
    assert max(spreads[True]) < 1.001
    assert max(spreads[False]) > 1.01


def test_a_gate_has_deviations_by_equation_4_of_smoothquant_before_its_hadamard_matrix() -> None:
    """s_j = σ(x_j)^½ / rms(w_j)^½ over its geometric mean; a rotation keeps the sum of what is left."""
    original = mamba().module
    assert isinstance(original, GraphModule)
    [gate] = gates(original)
    covariance = covariances(original, [gate.product], IMAGES, silent)[gate.product]
    weight = original.get_parameter(str(gate.linear.args[1].target)).detach().double()  # type: ignore[union-attr]
    s = [float(covariance[j, j]) ** 0.25 / float((weight[:, j] ** 2).mean()) ** 0.25 for j in range(len(covariance))]
    mean = torch.tensor(s).log().mean().exp().item()
    for smooth in (True, False):
        graph_module, _ = prepared_mamba(smooth=smooth)
        [site] = [site for site in sites(graph_module) if is_turn(site)]
        after = covariances(graph_module, [site.node], IMAGES, silent)[site.node]
        expected = sum(float(covariance[j, j]) / (s[j] / mean if smooth else 1) ** 2 for j in range(len(s)))
        assert float(after.trace()) == pytest.approx(expected, rel=1e-3)


def test_a_rebuilt_state_space_model_takes_the_state_dict_bit_for_bit() -> None:
    done = compress(mamba(), "mambaquant")
    [step] = done.steps
    assert isinstance(done.module, GraphModule)
    [site] = [site for site in sites(done.module) if is_turn(site)]
    assert all(node.op != "call_module" for node in site.node.all_input_nodes)  # the rotation isn't rounded
    rebuilt = mamba()
    step.technique.restore_(rebuilt, json.loads(json.dumps(step.record)))
    rebuilt.module.load_state_dict(done.module.state_dict())
    assert torch.equal(logits(rebuilt.module, images()), logits(done.module, images()))
