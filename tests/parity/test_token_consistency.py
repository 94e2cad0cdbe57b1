"""token_consistency's loss is the paper's, from two models that each reduce by a schedule of their own."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from colors import colors
from martlet.core import pipeline
from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Technique
from martlet.data.preprocess import Preprocess
from martlet.source import load_model
from martlet.techniques.tokens.mctf import MCTF
from martlet.techniques.tokens.stvit import STViT
from martlet.techniques.tokens.tome import ToMe
from martlet.techniques.tokens.tps import TPS
from martlet.techniques.train.token_consistency import TokenConsistency
from martlet.training.objective import Batch
from martlet.vit.tokens import install_, installed
from martlet.vit.view import view

PREPROCESS = Preprocess(size=(24, 24), resize=24)
SCHEDULE = {0: 4, 1: 6}
SEED, WEIGHT, CLASSES = 5, 0.7, 3


def vit(**kwargs) -> Model:
    """Of 36 patches, an odd depth and a register."""
    tiny = {"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "reg_tokens": 1} | kwargs
    model = load_model(
        "timm:vit_tiny_patch16_224",
        model_kwargs=tiny,
        num_classes=CLASSES,
        preprocess={"size": (24, 24), "resize": 24},
        seed=3,
    )
    torch.manual_seed(0)
    for name, parameter in model.module.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0, 0.6)
    return model


def reduced(model: Model, *by: Technique) -> Model:
    """In float64."""
    done = pipeline.run(model, Recipe(by), Context())
    done.module.double()
    return done


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 24, 24, generator=generator, dtype=torch.float64)
    indices = np.arange(4)
    return Batch(images=images, labels=torch.tensor([0, 2, 1, 2]), indices=indices, seeds=indices, step=step, steps=9)


def share(step: int) -> float:
    return float(np.random.default_rng((SEED, step)).random())


def read(model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the classifier reads (B, C), and logits (B, K)."""
    with torch.no_grad():
        features = model.module.forward_head(model.module.forward_features(images), pre_logits=True)
        return features, model.module(images)


def loss_by_hand(fewer: Model, more: Model, its: Batch, weight: float = WEIGHT) -> float:
    (f0, l0), (f1, l1) = (read(each, its.images) for each in (fewer, more))
    entropy = 0.0
    for logits in (l0, l1):
        for row, label in zip(logits.tolist(), its.labels.tolist(), strict=True):
            entropy -= (row[label] - math.log(sum(map(math.exp, row)))) / len(logits)
    distance = [(a - b) ** 2 for a, b in zip(f0.flatten().tolist(), f1.flatten().tolist(), strict=True)]
    return entropy + weight * sum(distance) / len(distance)


@pytest.mark.parametrize("technique", [ToMe, TPS, MCTF])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_the_loss_is_the_papers(technique, step):
    model = vit()
    fewer = reduced(model, technique(r=SCHEDULE))
    schedule = {block: int(share(step) * r) for block, r in SCHEDULE.items()}
    more = reduced(model, technique(r=schedule))
    objective = TokenConsistency(smoothing=0, weight=WEIGHT).objective(fewer, Context(seed=SEED))
    before = installed(view(fewer.module).blocks)
    found = float(objective.loss(fewer.module, batch(step)).detach())
    assert found == pytest.approx(loss_by_hand(fewer, more, batch(step)), rel=5e-7)
    assert installed(view(fewer.module).blocks) is before
    whole = reduced(model)
    for wrong in (loss_by_hand(fewer, whole, batch(step)), loss_by_hand(fewer, more, batch(step), 2 * WEIGHT)):
        assert found != pytest.approx(wrong, rel=5e-6)  # so it can fail
    assert len({int(share(step) * 6) for step in range(4)}) > 1


def test_a_share_of_nothing_is_the_whole_model():
    model = vit()
    fewer = reduced(model, ToMe(r=SCHEDULE))
    objective = TokenConsistency().objective(fewer, Context(seed=SEED))
    whole = installed(view(fewer.module).blocks)
    install_(objective.partly(view(fewer.module), whole, 0.01))
    torch.testing.assert_close(fewer.module(batch(0).images), reduced(model).module(batch(0).images))


def test_only_what_has_fewer_tokens_is_drawn():
    """The distance has no gradient through what is seen with more tokens: it is only of the other's."""
    fewer = reduced(vit(), ToMe(r=SCHEDULE))
    objective = TokenConsistency(weight=1e6).objective(fewer, Context(seed=SEED))
    layer = fewer.module.norm
    outs = []

    def keep(_module: object, _inputs: object, out: Tensor) -> None:
        out.retain_grad()
        outs.append(out)

    handle = layer.register_forward_hook(keep)
    objective.loss(fewer.module, batch(2)).backward()
    handle.remove()
    more, less = (float(out.grad.norm()) for out in outs)
    assert less > 100 * more > 0


def test_training_with_it_keeps_the_schedule():
    model = load_model(
        "timm:vit_tiny_patch16_224",
        model_kwargs={"img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2},
        num_classes=CLASSES,
        preprocess={"size": (24, 24), "resize": 24},
        seed=3,
    )
    recipe = Recipe((ToMe(r=SCHEDULE), TokenConsistency(epochs=6.0, batch=16, rate=1e-2, augment="none")))
    done = pipeline.run(model, recipe, Context(training=colors(PREPROCESS, 48)))
    curve = [loss for _, loss, *_ in done.steps[-1].record["curve"]]
    assert curve[-1] < 0.8 * curve[0]
    run = installed(view(done.module).blocks)
    assert run is not None
    assert set(run.decide) == {0, 1}
    assert not torch.equal(done.module.head.weight, model.module.head.weight)


@pytest.mark.parametrize("before", [None, STViT(tokens=(2, 2)), ToMe(r=0)])
def test_it_needs_a_reduction_that_can_be_undone_in_part(before):
    model = vit()
    if before is not None:
        model = reduced(model, before)
    with pytest.raises(RecipeError, match="put tome, mctf, tps, evit or turbo before it"):
        TokenConsistency().check(model)
    with pytest.raises(RecipeError, match=r"weight is -1; it can't be less than 0"):
        TokenConsistency(weight=-1)
