"""The loop learns, goes on where it was stopped to the same weights, leaves what isn't its own, and refuses."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from colors import colors
from martlet.core import pipeline
from martlet.core.errors import DataError, MartletError, NumericsError, RecipeError, UsageError
from martlet.core.kept import Kept
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, Stage
from martlet.data.examples import Examples
from martlet.data.preprocess import Preprocess
from martlet.source import load_model
from martlet.techniques.distill.distill import Distill
from martlet.techniques.tune.finetune import Finetune
from martlet.training import loop
from martlet.training.objective import Teacher

SIZE = (16, 16)
PREPROCESS = Preprocess(size=SIZE, resize=16)


def vit(**kwargs) -> Model:
    """With dropout, so that chance in the model is seen."""
    tiny = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "drop_rate": 0.1}
    preprocess = {"size": SIZE, "resize": 16, "mean": PREPROCESS.mean, "std": PREPROCESS.std}
    return load_model(
        "timm:vit_tiny_patch16_224", model_kwargs=tiny | kwargs, num_classes=3, preprocess=preprocess, seed=3
    )


def examples(n: int = 48, labels: bool = True) -> Examples:
    return colors(PREPROCESS, n, labels)


def trained(technique, context: Context, model: Model | None = None) -> Model:
    return pipeline.run(model or vit(), Recipe((technique,)), context)


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same(a: Model, b: Model) -> bool:
    return all(torch.equal(value, b.module.state_dict()[name]) for name, value in state(a).items())


class Halt(Exception):
    pass


def stopping_at(step: int):
    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("train, loss") and done == step:
            raise Halt

    return progress


def test_it_learns_colors_and_judges_by_images_that_it_holds_back():
    done = trained(Finetune(epochs=4, batch=32, rate=3e-3, augment="none"), Context(training=examples(510)))
    record = done.steps[0].record
    assert (record["images"], record["steps"]) == (500, 60)
    assert [step for step, _, _ in record["held_back"]] == [15, 30, 45, 60]
    assert record["held_back"][-1][2] == 100
    assert record["curve"][-1][1] < 0.6 * record["curve"][0][1]
    assert not done.module.training


MIXED = Finetune(epochs=3, batch=16, rate=1e-3, mixup=0.4, cutmix=0.5, ema=0.9)
POLICY = Finetune(epochs=2, batch=24, augment="rand-m5", erase=0.5)


@pytest.mark.parametrize(
    ("technique", "steps"),
    [
        (MIXED, (1, 5)),
        (POLICY, (3,)),
        (Distill(epochs=2, batch=24), (2,)),
        pytest.param(MIXED, range(1, 9), marks=pytest.mark.slow),
    ],
)
def test_stopped_at_any_step_it_goes_on_to_the_same_weights(technique, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    whole = trained(technique, Context(training=examples(), seed=4))
    for step in steps:
        context = Context(training=examples(), seed=4, kept=Kept(tmp_path / str(step)))
        with pytest.raises(Halt):
            trained(technique, replace(context, progress=stopping_at(step)))
        torch.rand(7)
        told = []
        context.progress = lambda what, done, total, told=told: told.append(done) if "loss" in what else None
        again = trained(technique, context)
        assert told[0] == step, "the step that was stopped in is done again, and none before it"
        assert same(again, whole), step
        assert again.steps[0].record == whole.steps[0].record


def test_weights_laid_out_for_convolutions_go_on_to_the_same_weights(tmp_path, monkeypatch):
    def model():
        model = vit(patch_size=4)
        model.module.to(memory_format=torch.channels_last)
        assert not model.module.patch_embed.proj.weight.is_contiguous()
        return model

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    whole = trained(MIXED, Context(training=examples(), seed=4), model())
    context = Context(training=examples(), seed=4, kept=Kept(tmp_path))
    with pytest.raises(Halt):
        trained(MIXED, replace(context, progress=stopping_at(3)), model())
    assert same(trained(MIXED, context, model()), whole)


def test_a_checkpoint_that_misses_a_moment_gives_other_weights(tmp_path, monkeypatch):
    """The test above can fail."""
    from martlet.training.checkpoint import State

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    whole = trained(MIXED, Context(training=examples(), seed=4))
    context = Context(training=examples(), seed=4, kept=Kept(tmp_path))
    with pytest.raises(Halt):
        trained(MIXED, replace(context, progress=stopping_at(5)))
    load_ = State.load_
    monkeypatch.setattr(
        State,
        "load_",
        lambda self, tensors, data: load_(
            self, {n: torch.zeros_like(t) if n.endswith("exp_avg") else t for n, t in tensors.items()}, data
        ),
    )
    assert not same(trained(MIXED, context), whole)


def test_the_seed_alone_decides_and_nobodys_randomness_is_used_up():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = trained(MIXED, Context(training=examples(), seed=4))
    drawn = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert drawn == (random.random(), np.random.rand(), float(torch.rand(())))
    assert same(trained(MIXED, Context(training=examples(), seed=4)), first)
    assert not same(trained(MIXED, Context(training=examples(), seed=5)), first)


def test_flags_and_the_teacher_are_as_they_were():
    model = vit()
    frozen = model.module.get_parameter("norm.bias")
    frozen.requires_grad_(False)
    before = state(model)
    done = trained(Distill(epochs=1), Context(training=examples(labels=False)), model)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert not model.module.training
    flags = {name: parameter.requires_grad for name, parameter in done.module.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["norm.bias"]
    assert all(parameter.grad is None for parameter in done.module.parameters())


def test_a_traced_graph_trains_as_the_module_does():
    """Without dropout, which the trace leaves out."""
    model = vit(drop_rate=0.0)
    graph = model.copy()
    pipeline.enter_(graph, Stage.GRAPH)
    technique = Finetune(epochs=2, batch=24, rate=1e-3)
    context = Context(training=examples(), teacher=model)
    a, b = (state(trained(technique, context, m)) for m in (model, graph))
    assert not torch.equal(a["head.weight"], model.module.state_dict()["head.weight"])
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-4)


def test_minutes_cut_the_schedule_and_a_resumed_run_keeps_what_was_decided(tmp_path, monkeypatch):
    now = [0.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    def tick(what: str, done: int, total: int) -> None:
        if what.startswith("train, loss"):
            now[0] += 1.0
            stopping_at(20)(what, done, total)

    monkeypatch.setattr(loop, "time", Clock)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    technique = Finetune(epochs=100, batch=16, minutes=0.5)  # a second a step: about 30 of 300
    context = Context(training=examples(), kept=Kept(tmp_path), progress=tick)
    with pytest.raises(Halt):
        trained(technique, context)
    now[0] = 1e6
    done = trained(technique, replace(context, progress=lambda *_: None))
    assert 25 <= done.steps[0].record["steps"] <= 33
    assert done.steps[0].record["curve"][-1][2] < 0.02 * technique.rate, "the rate has fallen by then"


def test_patience_stops_and_gives_the_best_weights():
    technique = Finetune(epochs=40, batch=100, rate=3.0, clip=0, warmup=0, patience=2, augment="none")
    done = trained(technique, Context(training=examples(510)))
    record = done.steps[0].record
    losses = [loss for _, loss, _ in record["held_back"]]
    best = losses.index(min(losses))
    assert record["steps"] == 5 * len(losses) < 200
    assert best == len(losses) - 3
    judged, _ = examples(510).split(10, 0)
    with torch.no_grad():
        logits = done.module(judged.normalize(judged.pixels))
    assert float(nn.functional.cross_entropy(logits, judged.labels)) == pytest.approx(losses[best], rel=1e-4)


def test_no_number_as_loss_stops_with_the_batch_saved(tmp_path):
    kept = Kept(tmp_path / "kept")
    with pytest.raises(
        NumericsError, match=r"finetune: the loss of step \d+ is (nan|inf); its batch is in .*rate lower"
    ):
        trained(
            Finetune(epochs=50, batch=24, rate=1e30, clip=0, warmup=0, augment="none"),
            Context(training=examples(), kept=kept),
        )
    [file] = kept.folder.glob("batch-*.safetensors")
    tensors, data = kept.load(file.stem)
    assert tensors["images"].shape == (24, 3, *SIZE)
    assert torch.equal(tensors["labels"], tensors["indices"] % 3)
    assert data["step"] == int(file.stem.removeprefix("batch-"))


def test_a_batch_that_does_not_fit_is_told_with_one_that_does(monkeypatch):
    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, x):
            if len(x) > 10:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
            return self.head(x.mean((2, 3)))

    model = Model(name="hungry", module=Hungry(), preprocess=PREPROCESS, num_classes=3, origin={})
    with pytest.raises(DataError, match="a batch of 32 doesn't fit into memory; one of 8 does; set batch: 8"):
        trained(Finetune(batch=32), Context(training=examples()), model)


def test_a_teacher_with_other_classes_is_refused():
    other = load_model("timm:vit_tiny_patch16_224", model_kwargs={"embed_dim": 48, "depth": 1}, num_classes=7)
    with pytest.raises(UsageError, match=r"has 7 classes and .* has 3; choose a teacher with the same classes"):
        trained(Distill(), Context(training=examples(), teacher=other))


def test_a_teacher_gets_images_as_it_wants_them():
    student = vit()
    model = Model(
        name="teacher",
        module=nn.Identity(),
        preprocess=Preprocess(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        num_classes=3,
        origin={},
    )
    gray = torch.full((1, 3, *SIZE), 200, dtype=torch.uint8)
    images = examples().normalize(gray)
    seen = Teacher(model, student).view(images)
    assert seen.shape == (1, 3, 32, 32)
    torch.testing.assert_close(seen, torch.full_like(seen, (200 / 255 - 0.5) / 0.25), rtol=1e-4, atol=1e-4)


def test_labels_are_asked_for_where_they_are_learned_from():
    with pytest.raises(RecipeError, match="finetune learns from labels, and colors has none; give some with --train"):
        trained(Finetune(), Context(training=examples(labels=False)))


def test_patience_without_images_to_judge_by_is_refused():
    with pytest.raises(RecipeError, match="held back of 500 or more; colors has 48"):
        trained(Finetune(patience=1), Context(training=examples()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it has to be more than 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"minutes": -1}, "minutes is -1; it can't be less than 0"),
        ({"warmup": 1.0}, "warmup is 1.0; it can be 0, or more and less than 1"),
        ({"precision": "f16"}, "precision is 'f16'; it can be auto, f32, bf16"),
        ({"mixup": 0.1, "batch": 3}, "batch is 3; images are mixed in pairs, so it has to be even"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        Finetune(**settings)


def test_an_unknown_policy_is_refused():
    with pytest.raises(RecipeError, match="augment is 'rnd'; it can be none, crop or one of timm's policies"):
        trained(Finetune(augment="rnd"), Context(training=examples()))


def test_the_record_is_json():
    record = trained(Finetune(epochs=1), Context(training=examples())).steps[0].record
    assert json.loads(json.dumps(record)) == record


def test_the_death_of_another_process_is_told(monkeypatch):
    import accelerate

    class Two(accelerate.Accelerator):
        num_processes = 2  # type: ignore[assignment]

    def reset(self) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41234")

    monkeypatch.setattr(loop._Run, "run_", reset)
    technique, context = Finetune(epochs=1, batch=16), Context(training=examples())
    with pytest.raises(RuntimeError, match="Connection closed"):
        trained(technique, context)
    monkeypatch.setattr(accelerate, "Accelerator", Two)
    with pytest.raises(MartletError, match="another process of the training died; the same command goes on from the"):
        trained(technique, context)
