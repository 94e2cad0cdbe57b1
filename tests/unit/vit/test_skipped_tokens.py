"""Tokens that go around blocks: what blocks get, what is refused, and that a trace and a reloaded model agree."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.preprocess import Preprocess
from martlet.functional.tokens import merge, rejoin, skip
from martlet.graph.trace import trace
from martlet.techniques.tokens.skipvit import SkipViT
from martlet.vit import view

SIZE = (40, 24)
"""Patches 5 by 3: odd in number."""


def build(**kwargs: object) -> Model:
    torch.manual_seed(1)
    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 3, "num_classes": 7}
    module = VisionTransformer(**(sizes | kwargs)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return Model(name="tiny", module=module, preprocess=Preprocess(size=SIZE), num_classes=7, origin={})


def apply(model: Model, technique: SkipViT) -> Model:
    return pipeline.run(model, Recipe((technique,)), Context())


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model.module(torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(5)))


def tokens_of(model: Model) -> list[tuple[int, int]]:
    """How many tokens each block's attention and MLP get."""
    seen: list[int] = []
    for block in view(model.module).blocks:
        for part in (block.attention, block.mlp):
            part.module.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    logits(model)
    return [*zip(seen[::2], seen[1::2], strict=True)]


def test_all_tokens_come_back_before_the_last_block() -> None:
    assert tokens_of(apply(build(), SkipViT(r={1: 4, 2: 5}))) == [(16, 16), (16, 12), (12, 7), (7, 7), (16, 1)]
    assert tokens_of(apply(build(global_pool="avg"), SkipViT(r={1: 4}, back=3)))[1:] == [
        (16, 12),
        (12, 12),
        *[(16, 16)] * 2,
    ]
    assert tokens_of(apply(build(), SkipViT()))[1:] == [(16, 8), (8, 8), (8, 8), (16, 1)]  # 55 % of fifteen


def test_nothing_skipped_is_the_untouched_model_to_the_bit() -> None:
    model = build()
    assert torch.equal(logits(apply(model, SkipViT(r=0))), logits(model))
    assert torch.equal(logits(apply(build(depth=1), SkipViT())), logits(build(depth=1)))


def test_trace_and_other_weights_agree() -> None:
    done = apply(build(reg_tokens=2), SkipViT(r={1: 4, 2: 5}))
    graph = trace(done.module, SIZE)
    for batch in (1, 3):
        images = torch.randn(batch, 3, *SIZE)
        with torch.no_grad():
            torch.testing.assert_close(graph(images), done.module(images), rtol=1e-4, atol=1e-4)
    [step] = done.steps
    fresh = copy.deepcopy(build(reg_tokens=2))
    step.technique.restore_(fresh, step.record)
    assert torch.equal(logits(fresh), logits(done))


def test_what_skipped_comes_back_as_it_was() -> None:
    torch.manual_seed(0)
    x, scores = torch.randn(2, 6, 4), torch.rand(2, 5)
    reduction = skip(scores, 2, 1)
    y, total = merge(x, reduction)
    assert y.shape == (2, 3, 4)
    assert torch.equal(total, torch.ones(2, 3))
    back = rejoin(y + 10, x, reduction)
    for image in range(2):
        stay = {0, *(1 + scores[image].topk(2).indices).tolist()}
        for token in range(6):
            expected = x[image, token] + (10 if token in stay else 0)
            torch.testing.assert_close(back[image, token], expected)


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (SkipViT(r={4: 3}, back=4), r"leave at blocks\.4 and come back before blocks\.4; .* such as r: \{3: 3\}"),
        (SkipViT(r={3: 3}, back=2), r"leave at blocks\.3 and come back before blocks\.2; .* such as r: \{1: 3\}"),
        (SkipViT(r={1: 3}, back=5), "back is 5; tiny has the blocks 0 to 4"),
        (SkipViT(r={1: 15}), r"r removes 15 tokens at blocks\.1, where 15 patches are left; at most 14"),
    ],
)
def test_what_does_not_fit_is_refused(technique: SkipViT, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        apply(build(global_pool="avg"), technique)


@pytest.mark.parametrize("back", [0, -1, 2.5, True, "3"])
def test_back_is_a_block(back: object) -> None:
    with pytest.raises(RecipeError, match=r"skipvit: back is .*; it can be the number of a block"):
        SkipViT(back=back)


def test_a_class_token_is_needed() -> None:
    with pytest.raises(RecipeError, match=r"skipvit asks at blocks\.1 what the class token attends to"):
        apply(build(class_token=False, global_pool="avg"), SkipViT())
