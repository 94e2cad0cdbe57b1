"""sherl gathers as the official code does, token by token by hand; and gradients stop where its late route begins."""

import math

import pytest
import torch
from torch import Tensor, nn

from colors import colors
from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.functional.redundancy import gather, redundancy
from martlet.nn.side import Tier
from martlet.source import load_model
from martlet.techniques.tune.sherl import Sherl

QUICK = {"epochs": 2, "batch": 16, "rate": 1e-2, "augment": "none"}


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def gathered_by_hand(
    features: list[list[float]], guide: list[float], weight: list[float], bias: float, spreads: bool = True
) -> list[float]:
    """Of one token."""
    weights = []
    for x in features:
        score = max(sum(w * v * g for w, v, g in zip(weight, x, guide, strict=True)) + bias, 0.0)
        repeated = sum(max(cosine(x, other), 0.0) for other in features)
        weights.append(score / repeated if spreads else score)
    total = sum(weights)
    if not total:
        return guide
    return [g + sum(w / total * x[c] for w, x in zip(weights, features, strict=True)) for c, g in enumerate(guide)]


def drawn() -> tuple[Tensor, Tensor, nn.Linear]:
    """Features (2, 3, 4, 5) of which the last repeats the first, a guide (2, 3, 5), and a score."""
    torch.manual_seed(0)
    x, guide, score = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 5).double(), nn.Linear(5, 1).double()
    x[..., 3, :] = 2 * x[..., 0, :] + 0.1 * x[..., 3, :]
    return x, guide, score


@pytest.mark.parametrize("spreads", [True, False])
def test_features_are_gathered_as_the_official_code_does(spreads):
    x, guide, score = drawn()
    [weight], bias = score.weight.tolist(), score.bias.item()
    found = gather(x, guide, score, spreads)
    by_hand = [
        torch.tensor([[gathered_by_hand(f.tolist(), g.tolist(), weight, bias, s) for f, g in zip(fs, gs, strict=True)]
                      for fs, gs in zip(x, guide, strict=True)])
        for s in (spreads, not spreads)
    ]  # fmt: skip
    torch.testing.assert_close(found, by_hand[0].double(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, by_hand[1].double(), rtol=1e-2, atol=1e-2)


def test_what_is_repeated_is_redundant_and_without_a_positive_weight_the_guide_is_left():
    one = torch.eye(3)
    assert redundancy(one).tolist() == [1, 1, 1]
    assert redundancy(torch.stack([one[0], one[0], -one[0]])).tolist() == pytest.approx([2, 2, 1])
    x, guide, score = drawn()
    with torch.no_grad():
        score.weight.zero_()
        score.bias.fill_(-1)
    assert torch.equal(gather(x, guide, score), guide)


def test_tiers_are_the_official_codes():
    """The embedding and all early blocks but the last are gathered by the last; the sum goes to the first late one."""
    torch.manual_seed(3)
    blocks = [nn.Linear(8, 8) for _ in range(3)]
    tiers = [Tier(block, 8, 4, i == 0, i == 2, spreads=True) for i, block in enumerate(blocks)]
    nn.init.normal_(tiers[2].leave.weight)
    x = torch.randn(2, 5, 8)
    found = tiers[2](tiers[1](tiers[0](x)))
    outs = [x]
    for block in blocks:
        outs.append(block(outs[-1]))
    [weight], bias = tiers[2].attend.weight.tolist(), tiers[2].attend.bias.item()

    def wanted(shallow: list[Tensor]) -> Tensor:
        deep = tiers[2].down(outs[3])
        rows = [
            [gathered_by_hand([s[b, n].tolist() for s in shallow], deep[b, n].tolist(), weight, bias) for n in range(5)]
            for b in range(2)
        ]
        return outs[3] + tiers[2].leave(torch.tensor(rows).clamp(min=0))

    shallow = [tiers[0].enter(outs[0]), tiers[0].down(outs[1]), tiers[1].down(outs[2])]
    torch.testing.assert_close(found, wanted(shallow), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, wanted(shallow[1:]), rtol=1e-3, atol=1e-3), "without the embedding"


def vit(depth: int = 4) -> Model:
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": depth, "num_heads": 2}
    preprocess = {"size": (16, 16), "resize": 16}
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=tiny, num_classes=3, preprocess=preprocess, seed=1)


def tuned(technique: Sherl, model: Model) -> Model:
    return pipeline.run(model, Recipe((technique,)), Context(training=colors(model.preprocess), seed=4))


@pytest.mark.parametrize("late", [1, 2])
def test_no_gradient_reaches_early_blocks_and_late_ones_pass_it_on(late):
    done = tuned(Sherl(narrower=4, late=late, **QUICK), vit())
    assert sum(isinstance(module, Tier) for module in done.module.modules()) == 4 - late
    done.module.requires_grad_(True)  # of all, so that only what gradients can't reach has none
    done.module(torch.randn(2, 3, 16, 16)).sum().backward()
    reached = {name for name, p in done.module.named_parameters() if p.grad is not None}
    assert not [n for n in reached if ".inner." in n or n.startswith(("patch_embed", "pos_embed", "cls_token"))]
    for name in ("blocks.0.enter.0.weight", "blocks.0.down.0.weight", f"blocks.{3 - late}.leave.weight"):
        assert name in reached
    assert f"blocks.{4 - late}.mlp.fc1.weight" in reached
    technique, kept = Sherl(), []
    for name, parameter in done.module.named_parameters():  # as in the loop
        parameter.requires_grad_(name.startswith("head.") or technique.chosen(name, parameter))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape[-1]) or t, lambda t: t):
        done.module(torch.randn(2, 3, 16, 16))
    assert kept.count(4 * 32) == 2 * late, "of each late MLP what its two derivatives need, and of early ones nothing"


def test_what_repeats_can_be_left_to_count_in_full():
    """Another model comes out; else the choice would do nothing."""
    ours, without = (tuned(Sherl(narrower=4, spreads=s, **QUICK), vit()) for s in (True, False))
    assert not torch.equal(ours.module.blocks[2].leave.weight, without.module.blocks[2].leave.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sherl(narrower=0), "sherl: narrower is 0; it has to be more than 0"),
        (lambda: tuned(Sherl(late=4), vit()), "has 4 blocks, which leaves none before 4 late ones"),
        (lambda: tuned(Sherl(narrower=33), vit()), "has 32 features; narrower can be 1 to 32"),
    ],
)
def test_what_can_not_be_is_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()
