"""ia_red2's policies and what they drop are the paper's, on an oracle that goes token by token; and they learn."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from token_oracle import images, through, vit
from torch import Tensor

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context
from martlet.data.preprocess import Preprocess
from martlet.nn.interpreter import Interpreter
from martlet.techniques.tokens import ia_red2
from martlet.techniques.tokens.ia_red2 import IARED2, relax
from martlet.vit import view
from martlet.vit.tokens import TokenRun, install_, patches_of

SCHEDULE = {0: 4, 2: 3, 4: 2}


class Batches:
    num_images = 16

    def __iter__(self):
        yield torch.randn(16, 3, 40, 24, generator=torch.Generator().manual_seed(4)).to(torch.get_default_dtype())


@pytest.fixture(autouse=True)
def float64():
    """Of the noise that a model is checked with, and of images."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def reduced(module: VisionTransformer, **settings: Any) -> tuple[Model, dict[str, Any]]:
    model = Model(name="vit", module=module, preprocess=Preprocess(size=(40, 24)), num_classes=7, origin={})
    technique = IARED2(**settings)
    technique.check(model)
    return model, technique.apply_(model, Context(images=Batches(), seed=1))


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model.module(images())


def normalized(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()


def score_by_hand(block: Any, reader: Tensor, x: Tensor, by: str) -> float:
    """How much the token x tells, to the class token."""
    heads, width = block.attn.num_heads, block.attn.head_dim
    if by == "policy":
        q, k = block.policy.query(normalized(reader)), block.policy.key(normalized(x))
    else:
        (q, _, _), (_, k, _) = (block.attn.qkv(block.norm1(each)).reshape(3, heads * width) for each in (reader, x))
    q, k = q.reshape(heads, width), k.reshape(heads, width)
    return sum(1 / (1 + math.exp(-float(q[h] @ k[h]) / math.sqrt(width))) for h in range(heads)) / heads


def logits_by_hand(module: VisionTransformer, schedule: dict[int, int], by: str = "policy") -> Tensor:
    out, prefix = [], module.num_prefix_tokens
    with torch.no_grad():
        for image in module.norm_pre(module._pos_embed(module.patch_embed(images()))):
            tokens = [(1.0, x) for x in image]
            for i, block in enumerate(module.blocks):
                if i in schedule:
                    scores = [score_by_hand(block, tokens[0][1], x, by) for _, x in tokens]
                    ranked = sorted(range(prefix, len(tokens)), key=lambda t, scores=scores: -scores[t])
                    stay = ranked[: len(ranked) - schedule[i]]
                    tokens = [*tokens[:prefix], *(tokens[t] for t in stay)]
                tokens = through(block, tokens, None, False)
            out.append(module.head(module.norm(tokens[0][1])))
    return torch.stack(out)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}])
def test_policies_drop_as_the_paper_says(kwargs: dict[str, Any]) -> None:
    module = vit(**kwargs)
    model, record = reduced(module, r=SCHEDULE, steps=0)
    assert record["removed"] == [[0, 4], [2, 3]]  # nobody reads what the last block would drop
    schedule = dict(record["removed"])
    torch.testing.assert_close(logits(model), logits_by_hand(vit(**kwargs), schedule, "attention"))  # as they begin
    torch.manual_seed(3)
    for i in schedule:
        for parameter in module.blocks[i].policy.parameters():
            torch.nn.init.normal_(parameter, 0, 0.5)
    plain = vit(**kwargs)
    for i in schedule:
        plain.blocks[i].policy = module.blocks[i].policy
    found = logits(model)
    torch.testing.assert_close(found, logits_by_hand(plain, schedule))
    assert not torch.allclose(found, logits_by_hand(plain, schedule, "attention"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits_by_hand(plain, schedule | {2: 2}), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits_by_hand(plain, {0: 4}), rtol=1e-4, atol=1e-4)


def test_what_policies_learn_on_is_what_will_run() -> None:
    """Counting for nothing is being dropped, but for the millionth that lets a gradient through."""
    module = vit()
    model, _ = reduced(module, r={1: 4, 3: 5}, steps=0)
    expected = logits(model)
    plain = vit()
    found = view(plain)
    patches = patches_of(found, 16)
    policies = {i: Interpreter(found.blocks[i]) for i in (1, 3)}
    pool: dict[int, Any] = {}
    for i, keep in ((1, 11), (3, 6)):
        pool[i - 1] = lambda x, size, patches, i=i, keep=keep: relax(x, size, patches, policy=policies[i], keep=keep)
    install_(TokenRun(found.blocks[1:], patches, {}, True, 1, pool=pool))
    y = plain(images())
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    for policy in policies.values():
        assert all(
            w.grad is not None and w.grad.abs().max() > 0 for w in policy.parameters() if w is not policy.key.bias
        )


def test_policies_learn_to_change_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ia_red2, "RATE", 1e-3)
    model, record = reduced(vit(), r={1: 6, 2: 4}, steps=60)
    assert record["kl_mean"]["after"] < record["kl_mean"]["before"]
    fresh = vit()
    IARED2().restore_(replace(model, module=fresh), record)
    assert not torch.equal(fresh(images()), logits(model))  # policies begin as they begin
    fresh.load_state_dict(model.module.state_dict(), strict=True)
    assert torch.equal(fresh(images()), logits(model))


def test_what_did_best_on_images_kept_aside_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps so large that policies leap about, what stays is what was judged, and it runs as it was judged."""
    monkeypatch.setattr(ia_red2, "RATE", 0.02)
    monkeypatch.setattr(ia_red2, "EVERY", 1)
    model, record = reduced(vit(), r={1: 6, 2: 3}, steps=6)
    [pool] = Batches()
    with torch.no_grad():
        found, expected = (each(pool[-4:]).log_softmax(-1) for each in (model.module, vit()))
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert divergence == pytest.approx(record["kl_mean"]["after"], rel=1e-2)
    assert divergence <= record["kl_mean"]["before"]


def test_a_copy_has_policies_of_its_own() -> None:
    model, _ = reduced(vit(), r={1: 6}, steps=0)
    expected, twin = logits(model), model.copy()
    with torch.no_grad():
        for parameter in view(twin.module).blocks[1].module.policy.parameters():  # type: ignore[union-attr]
            torch.nn.init.normal_(parameter)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(twin), expected)


def test_bad_input_is_refused() -> None:
    with pytest.raises(RecipeError, match="ia_red2: steps is -1; it can be 0 or more"):
        IARED2(steps=-1)
    with pytest.raises(RecipeError, match=r"ia_red2 asks at blocks\.1 what the class token attends to"):
        reduced(vit(class_token=False, global_pool="avg"))
    with pytest.raises(
        RecipeError, match=r"ia_red2: r removes 15 tokens at blocks\.1, where 15 patches are left; at m"
    ):
        reduced(vit(), r={1: 15})
    with pytest.raises(RecipeError, match="ia_red2 needs calibration images"):
        IARED2().apply_(Model(name="vit", module=vit(), preprocess=Preprocess(), num_classes=7, origin={}), Context())
