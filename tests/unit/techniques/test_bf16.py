"""bf16 alone is refused where the engine has none; as the rest of int8 it goes on in float32, and says so."""

import pytest
import torch
from torch import nn

from martlet.core import pipeline
from martlet.core.errors import UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.preprocess import Preprocess
from martlet.techniques.quantize.bf16 import BF16

WITH, WITHOUT = Context(precisions=("f32", "bf16")), Context(precisions=("f32",))


@pytest.fixture
def model() -> Model:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    return Model(name="tiny", module=module, preprocess=Preprocess(size=(2, 2)), num_classes=2, origin={})


@pytest.mark.parametrize("required", [True, False])
def test_where_the_engine_has_it(model, required):
    done = pipeline.run(model, Recipe((BF16(required=required),)), WITH)
    assert (done.precision, done.steps[0].record) == ("bf16", {"precision": "bf16"})
    assert torch.equal(done.module[1].weight, model.module[1].weight)


def test_where_it_does_not(model):
    done = pipeline.run(model, Recipe((BF16(required=False),)), WITHOUT)
    assert (done.precision, done.steps[0].record) == ("f32", {"precision": "f32"})
    with pytest.raises(UsageError, match=r"computes fast in f32 only; .*`bf16: \{required: false\}`"):
        BF16().check_engine(WITHOUT)
    with pytest.raises(UsageError, match="leave bf16 out"):
        pipeline.run(model, Recipe((BF16(),)), WITHOUT)


@pytest.mark.parametrize(
    ("record", "precision"), [({"precision": "f32"}, "f32"), ({"precision": "bf16"}, "bf16"), ({}, "bf16")]
)
def test_reloads_as_it_was_chosen(model, record, precision):
    BF16(required=False).restore_(model, record)
    assert model.precision == precision
