"""What every technique owes its users, asked of all of them: a new file is asked without anything being added here."""

import ast
import dataclasses
import inspect
from functools import partial
from pathlib import Path

import pytest
import torch

from martlet.core import pipeline, registry, store
from martlet.core.errors import MartletError, RecipeError, SourceError, UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import Context
from martlet.data.examples import Examples
from martlet.engine.torch import Torch
from martlet.graph.low_bit import LowBit
from martlet.graph.sequential import SequentialWeights
from martlet.merging.technique import Finetune, Merging
from martlet.source import load_model
from martlet.training.tuning import Tuning
from martlet.vit.pruning import Pruning
from martlet.vit.sparsity import Sparsity
from martlet.vit.tokens import TokenReduction

NAMES = tuple(registry.entries())
ALIKE = {
    name
    for name in NAMES
    if issubclass(
        registry.technique(name),
        LowBit | SequentialWeights | TokenReduction | Pruning | Sparsity | Merging | Tuning,
    )
    and name not in ("uniform", "adalog", "gptq", "tome", "magnitude", "fisher", "lora", "ladder")
}
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in NAMES]
"""Of techniques that are made from one class, one or two are applied in every run, and all by make test-all."""
NEED_TOKENS = ("tokens", "prune", "norm", "share")
"""Families that say of a model without tokens that it isn't theirs."""
FOR_ANY = ("dependency", "resolution")
"""Techniques of these families that say no such thing."""
NEED_HEADS = (
    *("comcat", "linformer", "adapter", "vpt", "ladder", "sherl"),
    *("linear_exits", "lgvit", "mue", "dyn_perceiver"),
)
"""Techniques of other families that say so too."""
NEED_LINEARS = ("lora", "lora_ga", "pyra", "light_peft")
"""Techniques for which a network of convolutions has no Linear but its classifier."""
NEED_EXITS = {
    "deer": "has no exits",
    "window": "has no exits",
    "eco_m2f": "has no exits",
    "cascade": "first names no model",
}
"""Techniques that come after one that adds exits, or need another model, and say so."""
NEED_TWO_TOKENS = ("deit_lt",)
"""Techniques for models with a distillation token, which say so of others."""
NEED_WIDE_LINEARS = ("svd", "afm")
"""Techniques for which a network of convolutions has no Linear that is large enough."""
NEED_INTEGER_FORMS = ("i_vit",)
"""Techniques that name the operation of a network of convolutions for which they have no form."""
NEED_BEFORE = {
    **{"lsq": "rounded", "e2e_qp": "rounded", "teacher_intervention": "rounded"},
    **{"pela": "factorized", "attach_lora": "split"},
}
"""Techniques that come after one that does something to the model, and say so."""
NEED_BEHIND = ("hint_aug",)
"""Techniques that change what the pass right behind them does, and do nothing alone."""
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
MODELS = {
    "class token": TINY,
    "no class token": TINY | {"class_token": False, "global_pool": "avg", "depth": 3},
    "registers and qk-norm": TINY | {"reg_tokens": 2, "qk_norm": True},
}


class Noise:
    """Calibration images: the same noise whenever they are asked for."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.num_images, self.size = 8, size

    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            yield torch.randn(4, 3, *self.size, generator=generator)


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Model:
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=MODELS[request.param], num_classes=10, seed=3)


@pytest.fixture(scope="module", params=EACH)
def recipe(request) -> Recipe:
    return Recipe((registry.technique(request.param)(),))


@pytest.fixture(scope="module")
def done(model, recipe) -> Model:
    """The model after the recipe; no test may change it. A model may be refused, in one line that says by what."""
    try:
        return run(model, recipe)
    except RecipeError as error:
        refusal = str(error)
    assert refusal.startswith(recipe.passes[0].name)
    assert "\n" not in refusal
    pytest.skip(f"refused: {refusal}")


def run(model: Model, recipe: Recipe, teacher: Model | None = None) -> Model:
    noise = Noise(model.preprocess.size)
    training = Examples.unlabelled(noise, model.preprocess)
    training.labels = torch.arange(len(training)) % model.num_classes
    context = Context(images=noise, training=training, finetunes=finetunes(model), teacher=teacher, seed=1)
    return pipeline.run(model, recipe, context)


def finetunes(model: Model) -> tuple[Finetune, ...]:
    """Two, for techniques that merge."""

    def read(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in state(model).items()
        }

    return tuple(Finetune(name=f"noise {seed}", read=partial(read, seed)) for seed in (1, 2))


def outputs(model: Model) -> torch.Tensor:
    images = torch.randn(2, 3, *model.preprocess.size, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        return model.module(images)


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", NAMES)
class TestDeclaration:
    def test_is_frozen_hashable_and_keyword_only(self, name):
        cls = registry.technique(name)
        technique = cls()
        assert hash(technique) == hash(cls())
        with pytest.raises(dataclasses.FrozenInstanceError):
            technique.anything = 1  # type: ignore[attr-defined]
        assert all(field.kw_only for field in dataclasses.fields(cls))

    def test_name_is_file_and_yaml_key(self, name):
        cls = registry.technique(name)
        assert cls.name == name == Path(inspect.getfile(cls)).stem
        assert Recipe.from_yaml(f"martlet: 1\npasses: [{name}]").passes == (cls(),)

    def test_has_defaults_that_survive_yaml(self, name):
        cls = registry.technique(name)
        recipe = Recipe((cls(),))
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        flipped = {f.name: not f.default for f in dataclasses.fields(cls) if isinstance(f.default, bool)}
        recipe = Recipe((cls(**flipped),))
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        assert recipe.passes[0].settings() == flipped

    def test_docstring_says_what_a_user_must_know(self, name):
        cls = registry.technique(name)
        doc = inspect.getdoc(cls) or ""
        lines = doc.splitlines()
        missing = [section for section in ("Needs:", "Cost:", "Paper:", "Differs:") if not has_section(lines, section)]
        assert not missing
        for field in dataclasses.fields(cls):
            said = any(f"{field.name}: " in (base.__doc__ or "") for base in cls.__mro__)
            assert said, f"neither the docstring nor that of a class it is made from says what {field.name} is"

    def test_summary_is_one_short_line(self, name):
        summary = registry.technique(name).summary
        assert summary == summary.strip()
        assert "\n" not in summary
        assert 0 < len(summary) <= 90
        assert not summary.endswith(".")

    def test_imports_no_other_technique(self, name):
        for node in ast.walk(ast.parse(Path(inspect.getfile(registry.technique(name))).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [module for module in modules if module.startswith("martlet.techniques")]


def has_section(lines: list[str], section: str) -> bool:
    """A line that begins with the section's name and goes on."""
    return any(line.startswith(section) and line.removeprefix(section).strip() for line in lines)


def test_source_model_is_left_untouched_and_the_result_is_deterministic(model, recipe, done):
    before, logits, facts = state(model), outputs(model), model.facts
    again = run(model, recipe)
    assert_same_state(state(model), before)
    assert torch.equal(outputs(model), logits)
    assert (model.facts, model.steps, model.precision) == (facts, [], "f32")
    assert again is not model
    assert [step.technique for step in again.steps] == list(recipe.passes)
    assert_same_state(state(again), state(done))
    assert [step.record for step in again.steps] == [step.record for step in done.steps]


def test_facts_are_honest(model, recipe, done):
    assert done.facts == recipe.facts(model.facts)
    tensors = {name: tensor for name, tensor in state(done).items() if tensor.ndim >= 2}
    codes = [name for name, tensor in tensors.items() if tensor.itemsize == 1 or not tensor.is_floating_point()]
    assert bool(codes) == ("float_weights" not in done.facts), f"weights as codes: {codes[:3]}"
    assert isinstance(done.module, torch.fx.GraphModule) <= ("module" not in done.facts)


def test_needs_are_honest(model, recipe, done):
    [technique] = recipe.passes
    if technique.needs_images:
        with pytest.raises(RecipeError, match=f"{technique.name} needs calibration images"):
            pipeline.run(model, recipe, Context(finetunes=finetunes(model)))
    else:
        assert pipeline.run(model, recipe, Context(finetunes=finetunes(model))).steps


def test_reloads_without_data_bit_for_bit(recipe, done, tmp_path):
    with store.writing(tmp_path / "out") as folder:
        files = store.write_model(folder, done, Torch())
        store.seal(folder, done, "torch", files)
    again = store.load(tmp_path / "out").model()
    assert_same_state(state(again), state(done))
    assert torch.equal(outputs(again), outputs(done))
    assert (again.facts, again.precision, again.stage) == (done.facts, done.precision, done.stage)
    assert store.load(tmp_path / "out").recipe == recipe


def test_a_reloaded_model_can_be_compressed_further(tmp_path):
    model = load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)
    first, second = Recipe.load("fuse"), Recipe((registry.technique("int8")(),))
    with store.writing(tmp_path / "out") as folder:
        fused = run(model, first)
        store.seal(folder, fused, "torch", store.write_model(folder, fused, Torch()))
    there = run(load_model(str(tmp_path / "out")), second)
    here = run(model, first | second)
    assert_same_state(state(there), state(here))
    assert torch.equal(outputs(there), outputs(here))


def test_a_second_application_is_refused_where_it_breaks_what_it_requires(model, recipe, done):
    [technique] = recipe.passes
    if technique.requires & technique.breaks:
        with pytest.raises(RecipeError, match=f"which passes\\[0\\] {technique.name} breaks; one of them is enough"):
            run(model, recipe | technique)
        return
    try:
        again = run(done, recipe, teacher=model)
    except RecipeError as error:  # there is no more to take away
        assert str(error).startswith(f"{technique.name}: ")  # noqa: PT017 - as in `done`
    else:
        assert len(again.steps) == 2


def refusal_of_convolutions(name: str) -> tuple[type[MartletError], str] | None:
    """With what a technique refuses a network of convolutions that nothing was done to; None if it takes it."""
    if (registry.entries()[name].family in NEED_TOKENS and name not in FOR_ANY) or name in NEED_HEADS:
        return SourceError, "no vision transformer"
    if name in NEED_TWO_TOKENS:
        return RecipeError, rf"^{name}: .* has no distillation token"
    if name in NEED_LINEARS:
        return RecipeError, rf"^{name}: the model has no Linear but its classifier"
    if name in NEED_WIDE_LINEARS:
        return RecipeError, rf"^{name}: no Linear of timm:repvit_m0_9 is large enough"
    if name in NEED_INTEGER_FORMS:
        return UsageError, rf"^{name}: timm:repvit_m0_9 has \w+ \(\w+\).* which has no integer form"
    if name in NEED_EXITS:
        return RecipeError, rf"^{name}: .*{NEED_EXITS[name]}"
    if name in NEED_BEHIND:
        return RecipeError, rf"^{name}: .* the pass right behind it .* is nothing; put one there"
    if name in NEED_BEFORE:
        return RecipeError, rf"^{name}: nothing of .* is {NEED_BEFORE[name]} yet; put what .* before it"
    return None


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", EACH)
def test_a_model_of_convolutions(name, tmp_path):
    """Train-time branches, batch norms and no attention."""
    kwargs = {"embed_dim": [16, 16, 16, 16], "depth": [1, 1, 1, 1]}
    preprocess = {"size": (64, 64), "resize": (64, 64)}
    model = load_model("timm:repvit_m0_9", model_kwargs=kwargs, num_classes=10, preprocess=preprocess, seed=3)
    recipe = Recipe((registry.technique(name)(),))
    if refused := refusal_of_convolutions(name):
        error, text = refused
        with pytest.raises(error, match=text):
            run(model, recipe)
        return
    done = run(model, recipe)
    with store.writing(tmp_path / "out") as folder:
        store.seal(folder, done, "torch", store.write_model(folder, done, Torch()))
    assert torch.equal(outputs(store.load(tmp_path / "out").model()), outputs(done))
