import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
from typer import Option

from martlet.cli.options import ImageOptions, ModelOptions, expanded, parse_kwargs
from martlet.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "kwargs"),
    [
        ("depth=6", {"depth": 6}),
        ("img_size=[32,48],depth=6, act_layer=gelu,scale=0.5", {"img_size": [32, 48], "depth": 6, "act_layer": "gelu"}),
        ("a=true,b=False,c=None,d=null", {"a": True, "b": False, "c": None, "d": None}),
        ("name=a=b", {"name": "a=b"}),
        ('{"depth": 6, "norm": {"eps": 1e-5}}', {"depth": 6, "norm": {"eps": 1e-5}}),
    ],
)
def test_model_kwargs(text, kwargs):
    assert kwargs.items() <= parse_kwargs(text).items()


@pytest.mark.parametrize("text", ["", "depth", "depth=6,", "=6", "a b=3", "{depth: 6}", '{"a": 1'])
def test_model_kwargs_that_are_none(text):
    with pytest.raises(UsageError, match="--model-kwargs"):
        parse_kwargs(text)


def test_preprocessing_is_what_was_given():
    assert ModelOptions().preprocess() == {}
    given = ModelOptions(image_size="32", resize="36,40", fit="cover", mean="0.1,0.2,0.3", interpolation="box")
    assert given.preprocess() == {
        "size": (32, 32),
        "resize": (36, 40),
        "fit": "cover",
        "mean": (0.1, 0.2, 0.3),
        "interpolation": "box",
    }
    assert ModelOptions(image_size="32,48", resize="none").preprocess() == {"size": (32, 48), "resize": None}
    assert ModelOptions(resize="36", std="1,1,1").preprocess() == {"resize": 36, "std": (1.0, 1.0, 1.0)}


@pytest.mark.parametrize("wrong", [{"image_size": "3x3"}, {"resize": "1,2,3"}, {"resize": "no"}, {"std": "1,1"}])
def test_preprocessing_that_cannot_be_read(wrong):
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')} takes"):
        ModelOptions(**wrong).preprocess()


def test_a_class_of_options_becomes_options():
    @dataclass(frozen=True, kw_only=True)
    class Size:
        height: Annotated[int, Option(help="In pixels.")]
        width: Annotated[int, Option()] = 3

    def verb(name: str, size: Size, deep: bool = False) -> int:
        return size.height * size.width * len(name) * (1 + deep)

    flat = expanded(verb)
    parameters = inspect.signature(flat).parameters
    assert list(parameters) == ["name", "height", "width", "deep"]
    assert parameters["height"].default is inspect.Parameter.empty
    assert parameters["width"].default == 3
    assert parameters["width"].annotation.__metadata__
    assert flat(name="ab", height=5, width=7, deep=True) == 140


def test_images_are_opened_as_asked(tmp_path):
    from PIL import Image

    for name in "abcd":
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name / "0.png")
    (tmp_path / "map.json").write_text('{"a": 7, "b": 5, "c": 3, "d": 1}')
    given = ImageOptions(images=str(tmp_path), split="test", limit=3, class_map=str(tmp_path / "map.json"))
    labels = [sample.label for sample in given.open(seed=1)]
    assert len(labels) == 3
    assert set(labels) < {7, 5, 3, 1}
