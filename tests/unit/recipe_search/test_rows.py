"""What blocks do to tokens one by one, as a model of its own that an engine times for any number of them."""

import pytest
import torch
from torch import nn

from martlet import engine
from martlet.core.recipe import Recipe
from martlet.recipe_search import rows
from martlet.recipe_search.rows import BLOCKS, Rows, times_ms
from martlet.recipe_search.space import context
from martlet.source import load_model
from martlet.vit.view import view

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


@pytest.fixture
def source():
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)


def test_every_product_with_weights_is_there_once_and_no_token_sees_another(source) -> None:
    apart, called = Rows(view(source.module).blocks[:BLOCKS]).eval(), []
    wanted = {m for block in source.module.blocks[:BLOCKS] for m in block.modules() if isinstance(m, nn.Linear)}
    for module in source.module.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, *_: called.append(m))
    tokens = torch.randn(5, 3, 1, 48)
    with torch.no_grad():
        y = apart(tokens)
        assert len(called) == len(wanted) == 4 * BLOCKS
        assert set(called) == wanted
        order = torch.randperm(5)
        torch.testing.assert_close(apart(tokens[order]), y[order])
        assert not torch.allclose(apart(tokens + 1), y)


def test_an_engine_times_any_number_of_tokens(source, monkeypatch) -> None:
    monkeypatch.setattr(rows, "SECONDS", 0.02)
    target, plain = engine.get("openvino"), "shift: false, smooth: false, split: false, ranges: minmax"
    recipe = Recipe.from_yaml(f"martlet: 1\npasses: [fuse, int8: {{{plain}}}]")
    found = times_ms(source, recipe, [17, 9, 3], target, 1, context(target))
    assert list(found) == [17, 9, 3]
    assert all(0 < ms < 100 for ms in found.values())
