"""hint_aug finds patches, confusion and steps as the paper says, by hand; and leads what tunes right behind it."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from colors import colors
from martlet.core import pipeline, registry, store
from martlet.core.errors import MartletError, RecipeError, SourceError, UsageError
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.engine.torch import Torch
from martlet.functional.hints import (
    attack_labels,
    attention_scores,
    confusion,
    infused,
    infusion_error,
    over_fitted_patches,
    patch_mask,
)
from martlet.source import load_model
from martlet.techniques.train.hint_aug import HintAug, Hinted
from martlet.techniques.tune.finetune import Finetune
from martlet.techniques.tune.ladder import Ladder
from martlet.techniques.tune.light_peft import LightPeft
from martlet.techniques.tune.lora import Lora
from martlet.techniques.tune.vpt import Vpt
from martlet.training import loop

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
QUICK = {"epochs": 2, "batch": 16, "rate": 1e-2, "augment": "none"}
HINTS = {"block": 1, "radius": 0.05, "begin": 0.0}
WAYS = ("lora", "adapter", "vpt")


def softmax(x: list[float]) -> list[float]:
    powers = [math.exp(v) for v in x]
    return [p / sum(powers) for p in powers]


def scores_by_hand(query: list[list[float]], keys: list[list[list[float]]], scale: float) -> list[float]:
    """Of one image."""
    per_head = [
        softmax([scale * sum(a * b for a, b in zip(q, k, strict=True)) for k in ks])
        for q, ks in zip(query, keys, strict=True)
    ]
    return [sum(head[j] for head in per_head) for j in range(len(keys[0]))]


def patch_by_hand(pretrained: list[float], tuned: list[float], sensitivity: float) -> int:
    moved = [abs(p - t) for p, t in zip(pretrained, tuned, strict=True)]
    judged = tuned if sum(moved) < sensitivity * sum(pretrained) else moved
    return judged.index(max(judged))


def confusion_by_hand(logits: list[list[float]], labels: list[int]) -> list[list[float]]:
    k = len(logits[0])
    return [
        [sum(f[i] - min(f) for f, y in zip(logits, labels, strict=True) if y == j) for j in range(k)] for i in range(k)
    ]


def attack_by_hand(c: list[list[float]], y: int) -> list[float]:
    total = sum(c[j][y] for j in range(len(c))) - c[y][y]
    return [0.0 if i == y else c[i][y] / total for i in range(len(c))]


def error_by_hand(logits: list[float], attack: list[float]) -> float:
    return -sum(w * math.log(p) for w, p in zip(softmax(attack), softmax(logits), strict=True))


def test_scores_are_the_papers():
    query, keys = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 5, 4).double()
    wanted = torch.tensor([scores_by_hand(q.tolist(), k.tolist(), 0.7) for q, k in zip(query, keys, strict=True)])
    torch.testing.assert_close(attention_scores(query, keys, 0.7), wanted.float())
    assert not torch.allclose(attention_scores(query, keys, 0.5), wanted.float(), rtol=1e-2)


def test_patches_are_the_papers():
    """Of images whose attention moved little, and much."""
    pretrained = torch.rand(20, 6).double()
    tuned = pretrained + torch.linspace(0, 0.4, 20)[:, None] * torch.randn(20, 6)
    found, attended, moved = (over_fitted_patches(pretrained, tuned, s, 1)[:, 0].tolist() for s in (0.2, 1e9, 0.0))
    by_hand = [patch_by_hand(p, t, 0.2) for p, t in zip(pretrained.tolist(), tuned.tolist(), strict=True)]
    assert found == by_hand
    assert found not in (attended, moved)
    two = over_fitted_patches(pretrained, tuned, 0.0, 2)
    wanted = (pretrained - tuned).abs().argsort(1, descending=True)[:, :2]
    assert two[1:].tolist() == wanted[1:].tolist()  # the first hasn't moved at all


def test_confusion_and_what_follows_from_it_are_the_papers():
    logits, labels = torch.randn(12, 4).double(), [0, 1, 2, 3, 0, 0, 1, 3, 3, 3, 2, 2]
    found = confusion(logits, torch.tensor(labels))
    c = confusion_by_hand(logits.tolist(), labels)
    torch.testing.assert_close(found.double(), torch.tensor(c).double(), rtol=1e-5, atol=1e-5)
    attack = attack_labels(found, torch.tensor(labels))
    wanted = torch.tensor([attack_by_hand(c, y) for y in labels])
    torch.testing.assert_close(attack, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(attack_labels(found.T, torch.tensor(labels)), wanted, atol=1e-2), "rows for columns"
    error = sum(error_by_hand(f, a) for f, a in zip(logits.tolist(), wanted.tolist(), strict=True))
    assert float(infusion_error(logits, attack)) == pytest.approx(error, rel=1e-5)
    assert float(infusion_error(logits, attack.roll(1, 1))) != pytest.approx(error, rel=1e-3)


def test_while_nothing_is_known_all_other_classes_are_alike():
    assert attack_labels(torch.zeros(3, 3), torch.tensor([1, 2])).tolist() == [[0.5, 0, 0.5], [0.5, 0.5, 0]]


def test_a_step_stays_in_its_patch_and_in_what_pixels_can_be():
    images, step = torch.rand(2, 3, 8, 12), torch.where(torch.rand(2, 3, 8, 12) < 0.5, -0.3, 0.3)
    mask = patch_mask(torch.tensor([[1], [5]]), (2, 3), (8, 12))
    low, high = torch.zeros(3, 1, 1), torch.full((3, 1, 1), 0.9)
    found = infused(images, step, mask, low, high)
    inside = torch.zeros(2, 3, 8, 12, dtype=torch.bool)
    inside[0, :, :4, 4:8] = inside[1, :, 4:, 8:] = True
    assert torch.equal(found[~inside], images[~inside])
    torch.testing.assert_close(found[inside], (images + step)[inside].clamp(0, 0.9))
    assert bool((found != images).any((1, 2, 3)).all())


def vit(num_classes: int = 3, **kwargs) -> Model:
    preprocess = {"size": (16, 16), "resize": 16}
    tiny = TINY | kwargs
    return load_model(
        "timm:vit_tiny_patch16_224", model_kwargs=tiny, num_classes=num_classes, preprocess=preprocess, seed=1
    )


def tuned(hints: HintAug, way, model: Model, **more) -> Model:
    return pipeline.run(model, hints | way, Context(training=colors(model.preprocess), seed=4, **more))


def noted(monkeypatch, hints: HintAug, way, model: Model) -> list[dict]:
    """Of each step: the student before, the batch, the confusion, and the images as they were changed."""
    steps, loss, change = [], Hinted.loss, Hinted._changed

    def look(self, student, batch):
        its = {"student": copy.deepcopy(student).eval(), "batch": batch, "confusion": self.confusion.clone()}
        steps.append(its)
        its["loss"] = loss(self, student, batch)
        return its["loss"]

    def keep(self, images, labels, seen):
        steps[-1]["changed"] = change(self, images, labels, seen)
        return steps[-1]["changed"]

    monkeypatch.setattr(Hinted, "loss", look)
    monkeypatch.setattr(Hinted, "_changed", keep)
    tuned(hints, way, model)
    return steps


def attention(module: nn.Module, images: Tensor) -> Tensor:
    """By timm's own attention, not fused: weights of each patch (B, N) for the sixth, summed over heads."""
    name = next(n for n in ("blocks.1.inner.attn", "blocks.1.attn") if n in dict(module.named_modules()))
    its, seen = module.get_submodule(name), []
    its.fused_attn = False
    its.attn_drop.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    with torch.no_grad():
        module(images)
    return seen[0][:, :, -16 + 5, -16:].sum(1)  # (B, H, N, N): of a grid of 4, row 1 and column 1


@pytest.mark.parametrize(
    ("way", "kwargs"), [("lora", {}), ("adapter", {"reg_tokens": 2, "qk_norm": True}), ("vpt", {})]
)
def test_a_step_is_the_papers(way, kwargs, monkeypatch):
    """The last of a training, when tuning has moved attention, with another path to attention and slopes."""
    model, hints = vit(**kwargs), HintAug(**HINTS, sensitivity=0.02)
    its = noted(monkeypatch, hints, registry.technique(way)(**QUICK), model)[-1]
    student, batch = its["student"], its["batch"]
    scores = [attention(m, batch.images).double().tolist() for m in (copy.deepcopy(model.module), student)]
    patches = [patch_by_hand(p, t, 0.02) for p, t in zip(*scores, strict=True)]
    assert len(set(patches)) > 1
    images = batch.images.clone().requires_grad_(True)
    logits, c = student(images), its["confusion"].tolist()
    attack = torch.tensor([attack_by_hand(c, y) for y in batch.labels.tolist()])
    (-(attack.softmax(1) * logits.log_softmax(1)).sum()).backward()
    std = torch.tensor(model.preprocess.std)[:, None, None]
    wanted = batch.images.clone()
    for b, patch in enumerate(patches):
        rows, columns = (slice(4 * i, 4 * i + 4) for i in divmod(patch, 4))
        wanted[b, :, rows, columns] -= (0.05 / std * images.grad[b].sign())[:, rows, columns]
    mean = torch.tensor(model.preprocess.mean)[:, None, None]
    wanted = wanted.clamp(-mean / std, (1 - mean) / std)
    torch.testing.assert_close(its["changed"], wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(its["changed"], 2 * batch.images - wanted, atol=1e-2), "up the slope"
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    with torch.no_grad():
        error = sum(smoothed(student(x), batch.labels) for x in (batch.images, its["changed"])) / 2
        torch.testing.assert_close(its["loss"].detach(), error, rtol=1e-4, atol=1e-5)


def test_confusion_is_that_of_the_epoch_before(monkeypatch):
    model = vit()
    steps = noted(monkeypatch, HintAug(**HINTS), Lora(**QUICK | {"epochs": 3}), model)
    assert len(steps) == 9
    assert not steps[2]["confusion"].any()
    for first in (0, 3):
        outs = [(its["student"](its["batch"].images), its["batch"].labels) for its in steps[first : first + 3]]
        wanted = confusion(*(torch.cat(parts) for parts in zip(*outs, strict=True)))
        torch.testing.assert_close(steps[first + 3]["confusion"], wanted.detach(), rtol=1e-4, atol=1e-3)
        assert torch.equal(steps[first + 3]["confusion"], steps[first + 5]["confusion"])


def test_where_images_are_mixed_patches_are_of_unmixed_ones(monkeypatch):
    model = vit()
    its = noted(monkeypatch, HintAug(**HINTS), Lora(**QUICK, mixup=0.5, cutmix=1.0), model)[-1]
    batch, data = its["batch"], colors(model.preprocess)
    images, labels = data.normalize(data.pixels)[batch.indices], data.labels[batch.indices]
    moved = (its["changed"] != images).any(1).sum((1, 2))
    assert bool(((moved > 0) & (moved <= 16)).all())
    assert not torch.allclose(batch.images, images, atol=0.1)
    hard, soft = nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss()
    with torch.no_grad():
        error = soft(its["student"](batch.images), batch.labels) + hard(its["student"](its["changed"]), labels)
    torch.testing.assert_close(its["loss"].detach(), error / 2, rtol=1e-4, atol=1e-5)


def test_each_half_can_be_left_out(monkeypatch):
    """Without the detector patches are others, without infusion steps go both ways at random, whatever the slope."""
    model, found = vit(), {}
    for name, changes in (("both", {}), ("where", {"detector": False}), ("what", {"infusion": False})):
        with monkeypatch.context() as patch:
            steps = noted(patch, HintAug(**HINTS, **changes), Lora(**QUICK), model)
        its = steps[0]  # whose student is the same
        found[name] = its["changed"] - its["batch"].images
    moved = {name: (step != 0).any(1) for name, step in found.items()}  # (B, H, W)
    assert all(int(m.sum()) <= 16 * 16 for m in moved.values())
    assert not torch.equal(moved["both"], moved["where"])
    assert len({tuple(m.nonzero()[0].tolist()) for m in moved["where"]}) > 4
    agreed = (found["both"].sign() == found["what"].sign())[(found["both"] != 0) & (found["what"] != 0)]
    assert 0.4 < float(agreed.float().mean()) < 0.6
    assert float((moved["both"] & moved["what"]).sum() / moved["both"].sum()) > 0.9


def weights(model: Model) -> list[Tensor]:
    return [p.detach() for p in model.module.parameters()]


def same(a: Model, b: Model) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def test_before_it_begins_images_are_seen_as_they_are_and_it_leads_one_pass_alone():
    model, way = vit(), Lora(**QUICK)
    plain = pipeline.run(model, Recipe((way,)), Context(training=colors(model.preprocess), seed=4))
    assert same(tuned(HintAug(block=1, begin=0.99), way, model), plain)
    led = tuned(HintAug(**HINTS), way, model)
    assert not same(led, plain)
    context = Context(training=colors(model.preprocess), teacher=model, seed=4)
    assert same(pipeline.run(led, Recipe((way,)), context), tuned_twice(model, way, context))


def tuned_twice(model: Model, way: Lora, context: Context) -> Model:
    return pipeline.run(model, HintAug(**HINTS) | way | way, context)


@pytest.mark.parametrize("way", WAYS)
def test_the_result_reloads_with_its_recipe(way, tmp_path):
    model, recipe = vit(), HintAug(**HINTS) | registry.technique(way)(**QUICK)
    done = pipeline.run(model, recipe, Context(training=colors(model.preprocess), seed=4))
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, done, "torch", store.write_model(folder, done, Torch()))
    again, images = store.load(tmp_path / "out"), torch.randn(2, 3, 16, 16)
    assert again.recipe == recipe
    assert torch.equal(again.model().module(images), done.module(images))


class Halt(Exception):
    pass


def test_stopped_it_goes_on_to_the_same_weights_and_with_other_hints_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    way, model, kept = Lora(**QUICK | {"epochs": 3}), vit(drop_rate=0.1), Kept(tmp_path)

    def halt(what: str, done: int, total: int) -> None:
        if what.startswith("train, loss") and done == 5:
            raise Halt

    def run(**more) -> Model:
        return tuned(HintAug(**HINTS | more, detector=False), way, model)

    whole = run()
    for hints in (HintAug(**HINTS, detector=False), HintAug(**HINTS | {"radius": 0.5}, detector=False)):
        with pytest.raises(Halt):
            tuned(hints, way, model, kept=kept, progress=halt)
    assert same(whole, tuned(HintAug(**HINTS, detector=False), way, model, kept=kept))
    assert same(run(radius=0.5), tuned(HintAug(**HINTS | {"radius": 0.5}, detector=False), way, model, kept=kept))
    assert not same(run(radius=0.5), whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0.0}, "radius is 0.0; it can be more than 0, up to 1"),
        ({"patches": 0}, "patches is 0; it has to be more than 0"),
        ({"block": -1}, "block is -1; it can't be less than 0"),
        ({"sensitivity": -0.1}, "sensitivity is -0.1; it can't be less than 0"),
        ({"begin": 1.0}, "begin is 1.0; it can be 0, or more and less than 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(RecipeError, match=f"^hint_aug: {message}"):
        HintAug(**settings)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: Recipe((HintAug(),)).facts(), RecipeError, "tunes on, which is nothing; put one there"),
        (lambda: (HintAug() | Finetune()).facts(), RecipeError, "tunes on, which is finetune; put one there"),
        (lambda: Recipe.load("tome | hint_aug | lora").facts(), RecipeError, "requires 'all_tokens'"),
        (lambda: tuned(HintAug(), Lora(), vit()), RecipeError, "has 2 blocks, and none is 4; it can be 0 to 1"),
        (lambda: tuned(HintAug(block=1, patches=17), Lora(), vit()), RecipeError, "has 16 patches; patches can be no"),
        (lambda: tuned(HintAug(block=1), Lora(), vit(num_classes=1)), RecipeError, "has 1 class, and none to confuse"),
        (
            lambda: tuned(HintAug(block=1), Lora(), vit(dynamic_img_size=True, img_size=24)),
            RecipeError,
            "images of 16 × 16 pixels aren't those that the patches of .* were made for",
        ),
        (
            lambda: tuned(HintAug(**HINTS), Ladder(narrower=4, **QUICK), vit()),
            RecipeError,
            "ladder lets no gradient through to the images; tune with lora, adapter or vpt, or set infusion: false",
        ),
        (
            lambda: tuned(HintAug(**HINTS), LightPeft(early=0.5, **QUICK), vit()),
            RecipeError,
            "attention at blocks.1.attn.qkv can't be compared with what it was, for heads were cut",
        ),
        (
            lambda: tuned(HintAug(**HINTS), Vpt(**QUICK), vit(), teacher=replace(vit(patch_size=8), name="other")),
            UsageError,
            "the teacher other has 2 × 2 patches and timm:.* has 4 × 4; give the model before it was tuned",
        ),
        (
            lambda: tuned(HintAug(**HINTS), Vpt(**QUICK), vit(), teacher=vit(num_classes=5)),
            UsageError,
            "has 5 classes",
        ),
    ],
)
def test_what_can_not_be_is_refused(run, error: type[MartletError], message):
    with pytest.raises(error, match=message):
        run()


def test_without_labels_it_says_what_to_give():
    model = vit()
    context = Context(training=colors(model.preprocess, labels=False))
    with pytest.raises(RecipeError, match=r"lora learns from labels, and colors has none; give some with --train"):
        pipeline.run(model, HintAug(**HINTS) | Lora(**QUICK), context)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        (
            "timm:swin_tiny_patch4_window7_224",
            {"img_size": 32, "window_size": 2, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)},
            SourceError,
            "hint_aug: attention at layers.0.blocks.0 is inside windows",
        ),
        (
            "timm:repvit_m0_9",
            {"embed_dim": [16, 16, 16, 16], "depth": [1, 1, 1, 1]},
            SourceError,
            "is no vision transformer",
        ),
    ],
)
def test_hosts_without_patches_that_see_all_are_refused(name, kwargs, error, message):
    preprocess = {"size": (32, 32), "resize": 32}
    model = load_model(name, model_kwargs=kwargs, num_classes=3, preprocess=preprocess, seed=1)
    with pytest.raises(error, match=message):
        HintAug(block=0).check(model)


def test_attention_that_can_not_be_seen_is_refused():
    module = TorchvisionViT(16, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=3)
    model = replace(vit(), name="theirs", module=module)
    with pytest.raises(
        RecipeError, match=r"hint_aug: encoder.* of theirs doesn't show what it attends to; take timm's"
    ):
        HintAug(block=0).check(model)
