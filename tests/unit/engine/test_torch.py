import numpy as np
import pytest
import torch
from tiny_models import VIT_MACS

from martlet import engine as engines
from martlet.core.errors import UsageError
from martlet.engine.torch import Torch


def test_runs_what_the_artifact_rebuilds(int8, lowered, images):
    model = int8("torch")
    session = Torch().open(lowered(model, "torch"), batch=3)
    with torch.no_grad():
        expected = model.module(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session(images), expected, rtol=0, atol=1e-6)


def test_bf16_is_bf16(vit, lowered, images):
    session = Torch().open(lowered(vit, "torch"), batch=3, precision="bf16")
    logits, exact = session(images), Torch().open(lowered(vit, "torch"), batch=3)(images)
    assert logits.dtype == np.float32
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.1  # 8 bits of mantissa: neither exact nor far
    ops = session.profile(images, repeats=1)
    assert {op.precision for op in ops if op.macs} == {"bf16"}
    assert sum(op.macs for op in ops) == VIT_MACS


def test_simulated_rounding_is_no_int8(int8, lowered, images):
    ops = Torch().open(lowered(int8("torch"), "torch"), batch=3).profile(images, repeats=1)
    assert {op.precision for op in ops if op.macs} == {"f32"}


def test_its_rounding_is_simulated_and_the_other_engines_is_not(vit, int8):
    assert Torch().simulates(int8("torch"))
    assert not Torch().simulates(vit)
    assert not engines.get("openvino").simulates(int8("openvino"))


def test_writes_nothing_and_needs_an_artifact(vit, tmp_path):
    assert Torch().lower(vit, tmp_path) == [] == list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="is no artifact"):
        Torch().open(tmp_path)


def test_the_number_of_threads_is_given_back(vit, lowered, images):
    before = torch.get_num_threads()
    Torch().open(lowered(vit, "torch"), batch=3, threads=1)(images)
    assert torch.get_num_threads() == before
