"""Recipes: YAML there and back, `|`, digests, and errors that say what to type."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from martlet.core.errors import RecipeError
from martlet.core.facts import ALL_FACTS, Fact
from martlet.core.model import Model
from martlet.core.recipe import Recipe, join, shipped
from martlet.core.technique import Context, Stage, Technique
from martlet.techniques.fuse.fuse import Fuse
from martlet.techniques.quantize.bf16 import BF16
from martlet.techniques.quantize.int8 import Int8


@dataclass(frozen=True, kw_only=True)
class Rounded(Technique):
    """Requires float weights and breaks them, as every weight quantizer will."""

    name: ClassVar[str] = "rounded"
    stage: ClassVar[Stage] = Stage.GRAPH
    summary: ClassVar[str] = "rounds weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.FLOAT_WEIGHTS})

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        return {}

    def restore_(self, model: Model, record: Mapping[str, Any]) -> None:
        return None


RECIPES = [
    Recipe(),
    Recipe((Fuse(),)),
    Recipe((Fuse(), Int8(), BF16())),
    Recipe((Int8(ranges="percentile", smooth=True, attention=False, bias_correction=False),)),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_yaml_round_trip(recipe):
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_possible_and_explained(name):
    recipe = Recipe.load(name)
    assert recipe.passes
    assert recipe.facts() < ALL_FACTS
    from martlet.core.recipe import SHIPPED

    first = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# {name}: ")


def test_pipes_join_in_order():
    assert Recipe() | Fuse() | Int8() | (Recipe() | BF16()) == Recipe((Fuse(), Int8(), BF16()))
    assert join([Recipe((Fuse(),)), Recipe(), Recipe((BF16(),))]) == Recipe((Fuse(), BF16()))
    assert Recipe.load("fuse | none") == Recipe((Fuse(),))
    assert Recipe.load("none") == Recipe()


def test_a_shipped_recipe_by_name():
    assert Recipe.load("int8-f32") == Recipe((Fuse(), Int8()))
    assert Recipe.load("int8") == Recipe((Fuse(), Int8(), BF16(required=False)))


def test_text_of_one_line():
    assert str(Recipe((Fuse(), Int8(ranges="minmax", smooth=False)))) == "fuse | int8(ranges=minmax, smooth=False)"
    assert str(Recipe()) == "none"


def test_needs_images():
    assert Recipe.load("int8").needs_images
    assert not Recipe.load("bf16").needs_images


def test_digest_changes_with_every_setting_pass_and_order():
    other: dict[str, object] = {"ranges": "minmax", "float_layers": ("head",)}
    other |= {field.name: not field.default for field in dataclasses.fields(Int8) if isinstance(field.default, bool)}
    fields = {field.name for field in dataclasses.fields(Int8)}
    assert fields == other.keys(), "a new setting needs another value here"
    recipes = [Recipe((Int8(**{name: other[name]}),)) for name in fields]
    recipes += [Recipe(), Recipe((Int8(),)), Recipe((Int8(), BF16())), Recipe((BF16(), Int8()))]
    assert len({recipe.digest() for recipe in recipes}) == len(recipes)


def test_digest_does_not_change_with_formatting():
    plain = "martlet: 1\npasses:\n- fuse\n- int8:\n    ranges: minmax\n"
    spaced = "# a comment\npasses: [fuse: {}, int8: {smooth: true, ranges: 'minmax'}]\nmartlet: 1"
    digests = {Recipe.from_yaml(text).digest() for text in (plain, spaced)}
    assert digests == {Recipe((Fuse(), Int8(ranges="minmax"))).digest()}
    [digest] = digests
    assert len(digest) == 16
    assert int(digest, 16) >= 0


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((BF16(), Int8()), "passes[1] int8 requires 'graph', which passes[0] bf16 breaks; move int8 before it"),
        ((Int8(), Fuse()), "passes[1] fuse requires 'module', which passes[0] int8 breaks; move fuse before it"),
        (
            (Fuse(), Int8(), Int8(smooth=False)),
            "passes[2] int8 requires 'float_activations', which passes[1] int8 breaks; one of them is enough",
        ),
        (
            (BF16(), BF16()),
            "passes[1] bf16 requires 'free_precision', which passes[0] bf16 breaks; one of them is enough",
        ),
        (
            (Rounded(), Int8()),
            "passes[1] int8 requires 'float_weights', which passes[0] rounded breaks; leave one of the two out",
        ),
    ],
)
def test_an_impossible_order_says_which_and_what_to_do(passes, message):
    with pytest.raises(RecipeError) as error:
        Recipe(passes).facts()
    assert str(error.value) == message


def test_a_fact_that_the_model_lacks():
    with pytest.raises(RecipeError) as error:
        Recipe((Int8(),)).facts(ALL_FACTS - {Fact.FLOAT_WEIGHTS})
    assert str(error.value) == "passes[0] int8 requires 'float_weights', which this model doesn't have"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("martlet: 1\npases: []", "r has an unknown key 'pases'; did you mean passes?"),
        ("passes: []", "r: its first line must be `martlet: 1`, not None"),
        ("martlet: 2\npasses: []", "r: its first line must be `martlet: 1`, not 2"),
        ("- int8", "r must be a mapping with the keys martlet and passes"),
        ("martlet: 1\npasses: int8", "r: passes must be a list"),
        ("martlet: 1\npasses: [3]", "r: passes[0] must be a technique's name, or one name with its settings"),
        ("martlet: 1\npasses: [{fuse: {}, int8: {}}]", "r: passes[0] must be a technique's name, or one name with"),
        ("martlet: 1\npasses: [fuse, int9]", "r: passes[1]: there is no technique 'int9'; did you mean int8"),
        ("martlet: 1\npasses: [int8: mse]", "r: passes[0] int8: settings must be a mapping"),
        (
            "martlet: 1\npasses: [int8: {range: mse}]",
            "r: passes[0]: int8 has no setting 'range'; did you mean ranges? (known: ranges, ",
        ),
        ("martlet: 1\npasses: [int8: {smooth: 1}]", "r: passes[0]: int8.smooth takes a bool, not 1 (int)"),
        ("martlet: 1\npasses: [int8: {ranges: max}]", "r: passes[0]: int8: ranges is 'max'; it can be "),
        ("martlet: [1", "r is not YAML: "),
        ("martlet: 2001-99-99", "r is not YAML: month must be"),
        ("martlet: 1\npasses: [fuse]\npasses: [int8]", "r: the key 'passes' stands twice, in lines 2 and 3"),
        (
            "martlet: 1\npasses:\n- int8:\n    smooth: true\n    split: true\n    smooth: false",
            "r: the key 'smooth' stands twice, in lines 4 and 6",
        ),
        ("!!python/object/apply:os.getcwd []", "r is not YAML: could not determine a constructor"),
    ],
)
def test_bad_yaml_is_one_clear_line(text, message):
    with pytest.raises(RecipeError) as error:
        Recipe.from_yaml(text, "r")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(Recipe.load("int8").to_yaml())
    assert Recipe.load(str(path)) == Recipe.load("int8")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"can't read the recipe .*gone\.yaml: No such file or directory"):
        Recipe.load(str(tmp_path / "gone.yaml"))


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"the recipe .*binary\.yaml is no text in UTF-8"):
        Recipe.load(str(tmp_path / "binary.yaml"))


def test_a_name_is_suggested_once():
    with pytest.raises(RecipeError) as error:
        Recipe.load("int9")  # `int8` is a recipe and a technique
    assert "did you mean int8, minivit, nvit?" in str(error.value)


@pytest.mark.parametrize(("name", "near"), [("int88", "int8"), ("bf15", "bf16"), ("fuse | fus", "fuse")])
def test_an_unknown_recipe_names_the_nearest(name, near):
    with pytest.raises(
        RecipeError, match=rf"there is no recipe '{name.split()[-1]}'; did you mean {near}.*martlet list"
    ):
        Recipe.load(name)
