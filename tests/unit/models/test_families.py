"""What every family of the zoo is asked: figures of its paper, interface, logits on the engines, gradients, sizes."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from families import CLASSES, FAMILIES, images, int8, tiny, traced

from martlet import engine as engines
from martlet import models
from martlet.core import store
from martlet.core.errors import SourceError
from martlet.graph.trace import example_values, trace
from martlet.measure.macs import macs, macs_by_node, macs_run
from martlet.models.papers.paper import Stated, figure

OF_A_PAPER = [name for name in models.names() if models.paper(name)]
ALWAYS = {*FAMILIES, "repvit_m0_9", "tiny_vit_5m_224", "convit_small"}
"""One of each family; and of timm's one that is fused, one of other classes unless told, and one with a difference. The
others by make test-all."""


def of_papers(always):
    """Every model whose paper's figures are kept; those that aren't `always` asked are slow."""
    every = (*OF_A_PAPER, *models.timm_names())
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in every]


def verdict(stated, quantity, counted):
    """Empty, or what is wrong with what the family says of the paper's figure."""
    if getattr(stated, quantity) is None:
        return ""
    if (agrees := stated.agrees(quantity, counted)) == (quantity in stated.differs):
        return f"{quantity}: {counted:,} {'agrees with' if agrees else 'is not'} {getattr(stated, quantity)}"
    return ""


OFTEN = ("cswin_tiny", "spectformer_h_small", "efficientvmamba_tiny")
"""Windows, a spectrum and a scan on every engine; the others by make test-all."""


def test_every_family_has_a_tiny_variant():
    def family(name):
        return timm.models.model_entrypoint(name).__module__

    assert {family(name) for name in FAMILIES} == {family(name) for name in OF_A_PAPER}


@pytest.mark.parametrize("name", of_papers(ALWAYS))
def test_params_are_the_papers(name):
    params = sum(parameter.numel() for parameter in models.skeleton(name).parameters())
    assert verdict(models.stated(name), "params", params) == ""


@pytest.mark.parametrize("name", of_papers(()))
def test_macs_are_the_papers(name):
    module, size = models.skeleton(name), models.image_size(name)
    if models.stated(name).counts_attention:
        counted = macs_run(module, size)
    else:
        with torch.device("meta"):
            graph = trace(module, size)
            counted = sum(n.macs for n in macs_by_node(graph, example_values(graph, size)).values() if not n.attention)
    assert verdict(models.stated(name), "macs", counted) == ""


def test_the_comparison_with_papers_can_fail():
    row = Stated(params="23M", macs="4.3G", differs={"macs": "why"})
    assert figure("4.3G") == (pytest.approx(4.3e9), pytest.approx(1e8))
    assert verdict(row, "params", 22_500_000) == ""  # it rounds to 23 M
    assert verdict(row, "params", 22_400_000) == "params: 22,400,000 is not 23M"
    assert verdict(row, "macs", 5_000_000_000) == ""
    assert verdict(row, "macs", 4_200_000_000) == "macs: 4,200,000,000 agrees with 4.3G"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_macs_of_the_graph_are_those_that_run(name):
    assert macs(traced(name)) == macs_run(copy.deepcopy(tiny(name)).to("meta"), FAMILIES[name].size)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_engines_give_the_logits_of_torch(name, tmp_path):
    model, x = traced(name), images(FAMILIES[name].size, 3)
    with torch.no_grad():
        expected = tiny(name)(x).numpy()
        folded = model.module(x).numpy()
    scale = np.abs(expected).max()
    assert np.abs(folded - expected).max() < 1e-4 * scale  # batch norms had statistics
    for engine in ("openvino", "onnxruntime"):
        folder = tmp_path / engine
        folder.mkdir()
        store.write_model(folder, model, engines.get(engine))
        logits = engines.get(engine).open(folder, batch=3)(x.numpy())
        assert np.abs(logits - expected).max() < 1e-3 * scale, engine
    assert np.abs(logits[::-1] - expected).max() > 0.01 * scale  # the comparison can fail


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_int8_runs(name):
    x = images(FAMILIES[name].size, 4)
    with torch.no_grad():
        expected, logits = tiny(name)(x), int8(name).module(x)
    error = (logits - expected).norm()
    assert error > 0
    assert 20 * torch.log10(expected.norm() / error) > FAMILIES[name].min_int8_sqnr_db


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_parameter(name):
    module = tiny(name)
    logits = module(images(FAMILIES[name].size))
    (logits * torch.randn(logits.shape)).sum().backward()
    named = dict(module.named_parameters())
    unreached = [key for key, value in named.items() if value.grad is None or not value.grad.any()]
    module.zero_grad(set_to_none=True)
    assert [key for key in unreached if not key.endswith(FAMILIES[name].unreached or ("/",))] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_head_and_features(name):
    torch.manual_seed(0)
    module, x = models.create(name, **FAMILIES[name].tiny).eval(), images(FAMILIES[name].size, 1)
    with torch.no_grad():
        features = module.forward_features(x)
        assert torch.equal(module.forward_head(features), module(x))
        pooled = module.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, module.head_hidden_size)
        module.reset_classifier(CLASSES)
        assert module(x).shape == (1, CLASSES) == (1, module.get_classifier().out_features)
        module.reset_classifier(0)
        if FAMILIES[name].features_hear_logits:
            pooled = module.forward_head(module.forward_features(x), pre_logits=True)
        assert torch.equal(module(x), pooled)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.hierarchical])
def test_features_only_gives_the_stages(name):
    x = images(FAMILIES[name].size, 1)
    module = timm.create_model(name, features_only=True, **FAMILIES[name].tiny).eval()
    with torch.no_grad():
        stages = module(x)
        fewer = timm.create_model(name, features_only=True, out_indices=(1,), **FAMILIES[name].tiny).eval()(x)
    (h, w), info = FAMILIES[name].size, module.feature_info
    shapes = [(1, c, h // r, w // r) for c, r in zip(info.channels(), info.reduction(), strict=True)]
    assert [tuple(stage.shape) for stage in stages] == shapes
    assert len(shapes) >= 2
    assert [tuple(stage.shape) for stage in fewer] == shapes[1:2]


@pytest.mark.parametrize("name", FAMILIES)
def test_other_sizes(name):
    family = FAMILIES[name]
    for size in family.others:
        with torch.no_grad():
            assert tiny(name)(images(size, 1)).shape == (1, CLASSES)
    if family.refused:
        size, says = family.refused
        with pytest.raises(SourceError, match=says):
            tiny(name)(images(size, 1))


def test_import_is_quick():
    code = "import torch, timm, time; t = time.process_time(); import martlet.models; print(time.process_time() - t)"
    seconds = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert seconds < 2
