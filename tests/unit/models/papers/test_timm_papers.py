"""Architectures of timm that stand beside the zoo: they are there, at their papers' sizes, in their papers' form."""

import pytest
import timm
import torch
from torch import nn

from martlet import models
from martlet.core.errors import SourceError
from martlet.models.papers.timm import PAPERS
from martlet.models.random_weights import randomize_


def test_the_installed_timm_has_all_and_each_is_of_one_paper():
    names = [name for paper in PAPERS for name in paper.models]
    assert list(models.timm_names()) == names
    assert len(set(names)) == len(names)
    assert set(names).isdisjoint(models.names())


def test_an_older_timm_leaves_out_what_it_lacks(monkeypatch):
    known = timm.is_model
    monkeypatch.setattr(timm, "is_model", lambda name: known(name) and not name.startswith("efficientvim"))
    left_out = {name for paper in PAPERS for name in paper.models} - {*models.timm_names()}
    assert left_out == {f"efficientvim_m{i}" for i in (1, 2, 3, 4)}


def test_reasons_are_given_of_figures_that_the_paper_states():
    for paper in PAPERS:
        for name, row in paper.models.items():
            assert set(row.differs) <= {key for key in ("params", "macs") if getattr(row, key)}, name


def test_a_model_is_typed_with_its_library():
    assert models.spec("repvit_m0_9") == "timm:repvit_m0_9"
    assert models.spec("digit_vit") == "martlet:digit_vit"


def test_images_are_of_the_papers_size():
    assert models.image_size("gernet_s") == (192, 192)  # timm's own weights are for 224
    assert models.image_size("mobilevitv2_100") == (256, 256)
    assert models.image_size("digit_vit") == (28, 28)


def test_the_skeleton_has_the_papers_form_and_no_values():
    fused, unfused = models.skeleton("repvit_m0_9"), models.skeleton("tiny_vit_5m_224")
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
    assert any(isinstance(part, nn.BatchNorm2d) for part in unfused.modules())
    assert {parameter.device for parameter in fused.parameters()} == {torch.device("meta")}
    assert unfused.num_classes == 1000  # timm's has 21,841


def test_random_weights_reach_what_is_kept_of_them():
    module, images = timm.create_model("levit_128s", num_classes=5).eval(), torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        plain = module(images)  # attention biases are kept from now on
        randomize_(module)
        expected = module(images)
        module.train().eval()
        assert torch.equal(module(images), expected)
    assert not module.training
    assert (expected - plain).abs().max() > 0.1


def test_random_weights_keep_the_signal_through_many_batch_norms():
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def between(settled):
        module = timm.create_model("efficientnet_b0", num_classes=5).eval()
        randomize_(module, images=images if settled else None)
        with torch.no_grad():
            logits = module(images)
        return float((logits[0] - logits[1]).abs().max() / logits.abs().max())

    assert between(settled=False) < 1e-4
    assert between(settled=True) > 0.05


@pytest.mark.parametrize("ask", [models.paper, models.stated, models.image_size, models.skeleton])
def test_unknown_name_gives_the_nearest(ask):
    with pytest.raises(SourceError, match=r"no model 'digits_vit'; did you mean digit_vit\?"):
        ask("digits_vit")
    with pytest.raises(SourceError, match=r"no model 'vit_tiny_patch16_224'"):
        ask("vit_tiny_patch16_224")  # timm has it, and the table hasn't
