"""distill's features and relations are the papers', number by number; and they are seen without touching the model."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from martlet.core import pipeline
from martlet.core.errors import RecipeError, SourceError, UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.functional.distillation import divergence, relation_divergence, relations, relative_error
from martlet.source import load_model
from martlet.techniques.distill.distill import Distill, Inside
from martlet.training.objective import Batch, Teacher
from martlet.training.signals import counterparts, observe
from martlet.vit.view import view

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def vit(seed: int, name: str = "timm:vit_tiny_patch16_224", **kwargs) -> Model:
    preprocess = {"size": (16, 16), "resize": 16}
    return load_model(name, model_kwargs=TINY | kwargs, num_classes=3, preprocess=preprocess, seed=seed)


def batch(n: int = 5) -> Batch:
    return Batch(images=torch.randn(n, 3, 16, 16), labels=None, indices=None, seeds=None, step=0, steps=1)  # type: ignore[arg-type]


def relation_by_hand(a: Tensor, b: Tensor, heads: int, scaled: bool = True) -> list[list[list[float]]]:
    """Of one image, (N, C) each: softmax of scaled products, head by head."""
    width = a.shape[1] // heads
    found = []
    for h in range(heads):
        rows = []
        for i in range(len(a)):
            scores = [
                sum(float(a[i, h * width + c]) * float(b[j, h * width + c]) for c in range(width))
                / (math.sqrt(width) if scaled else 1)
                for j in range(len(b))
            ]
            total = sum(math.exp(s) for s in scores)
            rows.append([math.exp(s) / total for s in scores])
        found.append(rows)
    return found


def divergence_by_hand(student: Tensor, teacher: Tensor, heads: int, scaled: bool = True) -> float:
    total, count = 0.0, 0
    for s, t in zip(student, teacher, strict=True):
        for p_head, q_head in zip(
            relation_by_hand(t, t, heads, scaled), relation_by_hand(s, s, heads, scaled), strict=True
        ):
            for p_row, q_row in zip(p_head, q_head, strict=True):
                total += sum(p * math.log(p / q) for p, q in zip(p_row, q_row, strict=True))
                count += 1
    return total / count


def test_relations_are_the_papers():
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 10)
    found = float(relation_divergence(relations(student, student, 2), relations(teacher, teacher, 2)))
    assert found == pytest.approx(divergence_by_hand(student, teacher, 2), rel=1e-5)
    assert found != pytest.approx(divergence_by_hand(student, teacher, 2, scaled=False), rel=1e-2)


def test_features_are_relative():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    wanted = sum((s - t) ** 2 for s, t in pairs) / sum(t**2 for _, t in pairs)
    assert float(relative_error(student, teacher)) == pytest.approx(wanted, rel=1e-5)
    assert float(relative_error(7 * student, 7 * teacher)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("timm:vit_tiny_patch16_224", {"reg_tokens": 1}),
        ("timm:swin_tiny_patch4_window7_224", {"patch_size": 2, "window_size": 4, "depths": [2], "num_heads": [2]}),
    ],
)
def test_what_is_seen_is_what_the_modules_gave_and_nothing_stays(name, kwargs):
    kwargs = {k: v for k, v in (TINY | kwargs).items() if not ("swin" in name and k == "depth")}
    model = load_model(
        name, model_kwargs=kwargs, num_classes=3, preprocess={"size": (16, 16), "resize": 16}, seed=1
    ).module
    images = torch.randn(2, 3, 16, 16)
    logits, signals = observe(model, images, attention=True)
    assert torch.equal(logits, model(images))
    last = view(model).blocks[-1]
    seen = {}
    last.module.register_forward_hook(lambda _m, inputs, out: seen.update(tokens=out, x=inputs[0]))
    last.attention.query.module.register_forward_hook(lambda _m, _i, out: seen.update(qkv=out))
    model(images)
    assert torch.equal(signals.tokens[-1], seen["tokens"])
    for rows, found in zip((0, 1, 2), signals.attention[-1], strict=True):
        assert torch.equal(found, seen["qkv"].chunk(3, -1)[rows])
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    assert hooks == 2, "only those of this test"
    signals.tokens[0].sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_blocks_learn_from_those_that_are_as_deep():
    assert counterparts(3, 3) == [0, 1, 2]
    assert counterparts(3, 12) == [3, 7, 11]
    assert counterparts(4, 6) == [1, 2, 4, 5]
    assert counterparts(2, 1) == [0, 0]


def test_the_loss_is_the_sum_of_its_parts():
    model, other = vit(1), vit(2, embed_dim=32, depth=4, num_heads=4)
    its = batch()
    objective = Inside(Teacher(other, model), 1.0, view(model.module), 0.5, 2.0, seed=3)
    with torch.no_grad():
        logits, own = observe(model.module, its.images, attention=True)
        wanted, theirs = observe(other.module, its.images, attention=True)
        features = [
            relative_error(f(own.tokens[i]), theirs.tokens[j])
            for f, i, j in zip(objective.adapters, (0, 1), (1, 3), strict=True)
        ]
        related = [
            relation_divergence(relations(a, a, 4), relations(b, b, 4))
            for i, j in ((0, 1), (1, 3))
            for a, b in zip(own.attention[i], theirs.attention[j], strict=True)
        ]
        whole = divergence(logits, wanted) + 0.5 * sum(features) / 2 + 2.0 * sum(related) / 6
        assert float(objective.loss(model.module, its)) == pytest.approx(float(whole), rel=1e-5)
    weights = [layer.weight for layer in objective.adapters]
    again = Inside(Teacher(other, model), 1.0, view(model.module), 0.5, 2.0, seed=3)
    assert all(torch.equal(a, b.weight) for a, b in zip(weights, again.adapters, strict=True))
    groups = objective.groups(model.module, 0.0)
    assert any(weights[0] is p for group in groups for p in group["params"]), "what adapts the width is learned"


@pytest.mark.parametrize("settings", [{"features": 1.0}, {"relations": 1.0}])
def test_a_student_comes_nearer_inside(settings):
    teacher, student = vit(1), vit(2)
    pixels = torch.randint(0, 256, (32, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    examples = Examples(pixels, None, teacher.preprocess, "noise")
    technique = Distill(epochs=40, batch=32, rate=1e-2, weight_decay=0.0, augment="none", **settings)
    done = pipeline.run(student, Recipe((technique,)), Context(training=examples, teacher=teacher))
    images = examples.normalize(pixels)

    def distance(model: Model) -> float:
        with torch.no_grad():
            own, theirs = (observe(m.module, images, attention=True)[1] for m in (model, teacher))
            if "features" in settings:
                return float(relative_error(own.tokens[-1], theirs.tokens[-1]))
            return float(
                relation_divergence(*(relations(s.attention[-1][0], s.attention[-1][0], 2) for s in (own, theirs)))
            )

    before, after = distance(student), distance(done)
    assert after < 0.5 * before
    assert not any(module._forward_hooks for module in done.module.modules())


def test_what_does_not_fit_is_refused():
    images = Examples(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), None, vit(1).preprocess, "black")
    context = Context(training=images, teacher=vit(1, patch_size=4))
    with pytest.raises(UsageError, match=r"has tokens \(17,\) where blocks.0 has \(5,\); leave features and relations"):
        pipeline.run(vit(1), Recipe((Distill(features=1.0),)), context)
    with pytest.raises(RecipeError, match="relations is -1; it can't be less than 0"):
        Distill(relations=-1)
    inside = VisionTransformer(16, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16)
    with pytest.raises(SourceError, match=r"doesn't show its query; leave these signals out"):
        observe(inside, torch.randn(1, 3, 16, 16), attention=True)


def test_a_traced_student_is_refused():
    with pytest.raises(SourceError, match="already a traced graph"):
        observe(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), torch.randn(1, 2))
