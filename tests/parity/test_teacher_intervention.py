"""A teacher's signals take the place of a student's as an interpreter puts them there node by node; less and less."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from martlet.core import pipeline, store
from martlet.core.errors import RecipeError, UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.engine.torch import Torch
from martlet.functional.distillation import divergence
from martlet.graph.trace import trace
from martlet.source import load_model
from martlet.techniques.qat.lsq import LSQ
from martlet.techniques.qat.teacher_intervention import TeacherIntervention
from martlet.training.intervened import Intervened, Signal
from martlet.training.objective import Batch

aten = torch.ops.aten
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
QUICK = {"epochs": 3, "batch": 16, "rate": 1e-3, "augment": "none"}


def source(name: str = "timm:vit_tiny_patch16_224", **kwargs) -> Model:
    preprocess = {"size": (16, 16), "resize": 16}
    return load_model(name, model_kwargs=TINY | kwargs, num_classes=5, preprocess=preprocess, seed=3)


def images(model: Model, n: int = 32) -> Examples:
    pixels = torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Examples(pixels, None, model.preprocess, "noise")


class Batches:
    num_images = 32

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __iter__(self):
        yield self.examples.normalize(self.examples.pixels)


def rounded(model: Model) -> Model:
    recipe = Recipe.from_yaml("martlet: 1\npasses: [uniform: {weight_bits: 2, activation_bits: 6}]")
    return pipeline.run(model, recipe, Context(images=Batches(images(model))))


def kind_of(node: Node, seen: dict[str, int]) -> tuple[str, int] | None:
    """What a node of the tiny model is, and of which block: by its operation and the order of these alone."""
    if node.target is aten.softmax.int:
        kind = "weights"
    elif node.target is aten.matmul.default:
        kind = "scores" if seen.get("scores", 0) == seen.get("context", 0) else "context"
    elif node.target is aten.linear.default and str(node.args[1]).replace("_", ".").count("attn.proj"):
        kind = "output"
    else:
        return None
    seen[kind] = seen.get(kind, 0) + 1
    return kind, seen[kind] - 1


class ByHand(Interpreter):
    """Keeps the signals of a graph, of which those of one kind are another's."""

    def __init__(self, graph_module: GraphModule, kind: str | None = None, theirs: dict | None = None) -> None:
        super().__init__(graph_module)
        self.kind, self.theirs = kind, theirs or {}
        self.own: dict[tuple[str, int], Tensor] = {}
        self.seen: dict[str, int] = {}

    def run_node(self, n: Node) -> object:
        value, found = super().run_node(n), kind_of(n, self.seen)
        if found is None:
            return value
        self.own[found] = value
        return self.theirs[found] if found[0] == self.kind else value


def relative(a: Tensor, b: Tensor) -> float:
    pairs = list(zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True))
    return sum((x - y) ** 2 for x, y in pairs) / sum(y * y for _, y in pairs)


def loss_by_hand(student: GraphModule, teacher: GraphModule, x: Tensor, kind: str | None) -> float:
    theirs = ByHand(teacher)
    wanted = theirs.run(x)
    own = ByHand(student, kind, theirs.own)
    logits = own.run(x)
    learned = [key for key in theirs.own if key[0] in ("scores", "output")]
    assert len(learned) == 4
    errors = sum(relative(own.own[key], theirs.own[key]) for key in learned) / 2
    return float(divergence(logits, wanted)) + errors


def batch_of(x: Tensor, step: int, steps: int = 60) -> Batch:
    rows = np.arange(len(x))
    return Batch(images=x, labels=None, indices=rows, seeds=rows, step=step, steps=steps)


STEPS = {"output": (0, 4), "context": (5, 9), "weights": (10, 29), None: (30, 59)}


@torch.no_grad()
def test_a_teachers_signals_take_the_place_of_the_students_as_by_hand():
    model = source()
    student, examples = rounded(model), images(model)
    x = examples.normalize(examples.pixels[:4])
    objective = TeacherIntervention().objective(student, Context(teacher=model))
    assert isinstance(objective, Intervened)
    plain, teacher = student.copy().module, trace(model.copy().module, (16, 16))
    by_hand = {kind: loss_by_hand(plain, teacher, x, kind) for kind in STEPS}
    before = plain(x)
    objective.prepare_(student.module)
    for kind, steps in STEPS.items():
        for step in steps:
            found = float(objective.loss(student.module, batch_of(x, step)))
            assert found == pytest.approx(by_hand[kind], rel=1e-4), (kind, step)
            others = [value for other, value in by_hand.items() if other != kind]
            assert all(abs(found - value) > 1e-3 * abs(value) for value in others), "signals of another kind"
    torch.testing.assert_close(student.module(x), before), "outside of a step nothing is replaced"
    objective.finish_(student.module)
    assert [str(n) for n in student.module.graph.nodes] == [str(n) for n in plain.graph.nodes]
    torch.testing.assert_close(student.module(x), before)


def test_the_schedule_is_the_official_codes_and_ends_with_nothing():
    model = source()
    objective = TeacherIntervention(intervened=0.5).objective(rounded(model), Context(teacher=model))
    assert isinstance(objective, Intervened)
    found = [objective.replaced(step, 60) for step in range(60)]
    assert found == ["output"] * 5 + ["context"] * 5 + ["weights"] * 20 + [None] * 30
    objective.share = 1.0
    assert objective.replaced(59, 60) == "weights"
    objective.share = 0.0
    assert objective.replaced(0, 60) is None


def test_scores_that_are_masks_say_nothing_and_outputs_always_do():
    x, theirs = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 2.0, -100.0])
    for kind, wanted in (("scores", 1 / 5), ("output", 10001 / 10005), ("context", None)):
        signal = Signal("node", kind)
        signal.theirs = theirs
        assert torch.equal(signal(x), x)
        assert (signal.error is None) if wanted is None else float(signal.error) == pytest.approx(wanted)


def test_what_a_teacher_replaces_learns_on():
    model = source()
    student, examples = rounded(model), images(model)
    x = examples.normalize(examples.pixels[:8])
    objective = TeacherIntervention().objective(student, Context(teacher=model))
    objective.prepare_(student.module)
    for group in objective.groups(student.module, 0.0):
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    objective.loss(student.module, batch_of(x, 0)).backward()
    layers = {name: layer for name, layer in objective.layers.items() if hasattr(layer, "weight")}
    slopes = {name: float(layer.weight.grad.abs().sum()) for name, layer in layers.items()}
    assert all(slope > 0 for slope in slopes.values()), slopes
    assert len(slopes) >= 8


def test_a_quantized_model_learns_under_it_keeps_its_form_and_reloads(tmp_path):
    model = source()
    student, examples = rounded(model), images(model)
    context = Context(training=examples, teacher=model, seed=1)
    x = examples.normalize(examples.pixels)
    done = pipeline.run(student, Recipe((TeacherIntervention(**QUICK | {"epochs": 15}),)), context)
    with torch.no_grad():
        errors = [float(divergence(m.module(x), model.module(x))) for m in (student, done)]
    assert errors[1] < 0.6 * errors[0]
    kinds = [{name: type(m).__name__ for name, m in each.module.named_modules()} for each in (student, done)]
    assert kinds[0] == kinds[1]
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, done, "torch", store.write_model(folder, done, Torch()))
    with torch.no_grad():
        assert torch.equal(store.load(tmp_path / "out").model().module(x), done.module(x))


def trained(technique, student: Model, teacher: Model | None) -> Model:
    return pipeline.run(student, Recipe((technique,)), Context(training=images(student), teacher=teacher))


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: TeacherIntervention(intervened=1.5), RecipeError, "intervened is 1.5; it can be from 0 to 1"),
        (
            lambda: trained(TeacherIntervention(), source(), None),
            RecipeError,
            "teacher_intervention: nothing of timm:vit_tiny_patch16_224 is rounded yet; put what quantizes before it",
        ),
        pytest.param(
            lambda: trained(TeacherIntervention(**QUICK), rounded(source()), source(depth=1)),
            UsageError,
            "has 1 attentions and the model has 2; give a teacher of the same shape, or train with lsq",
            marks=pytest.mark.slow,
        ),
        (
            lambda: trained(TeacherIntervention(**QUICK), rounded(source()), source(num_heads=4)),
            UsageError,
            r"the teacher has \(4, 5, 5\) at matmul_default where the model has \(2, 5, 5\)",
        ),
    ],
)
def test_what_can_not_be_is_refused(run, error, message):
    with pytest.raises(error, match=message):
        run()


@pytest.mark.slow
def test_a_teacher_of_another_shape_trains_under_lsq():
    """As the message says."""
    assert trained(LSQ(**QUICK), rounded(source()), source(depth=1)).steps
