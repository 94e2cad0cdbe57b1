"""benchmarks/formats.py: its recipes are recipes, entries replace each other, and its share of MACs is right."""

import sys
from pathlib import Path

import pytest

from martlet.core.recipe import Recipe
from martlet.engine.base import Op

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
formats = pytest.importorskip("formats")


def test_every_format_is_a_recipe() -> None:
    recipes = {name: Recipe.from_yaml(f"martlet: 1\npasses: {passes}") for name, passes in formats.FORMATS.items()}
    assert len({recipe.digest() for recipe in recipes.values()}) == len(recipes) >= 9
    assert recipes["INT8 (W8A8)"] == Recipe.load("int8")
    assert recipes["INT4 weights of Linears (GPTQ)"] == Recipe.load("gptq-w4")


def test_an_entry_takes_the_place_of_its_own_and_no_others() -> None:
    first = {"model": "a", "format": "NF4", "engine": "one", "top1_pct": 1.0}
    entries = [first, first | {"engine": "two"}]
    formats.keep(entries, first | {"top1_pct": 2.0})
    formats.keep(entries, first | {"format": "FP32"})
    assert [(e["format"], e["engine"], e["top1_pct"]) for e in entries] == [
        ("NF4", "one", 2.0),
        ("NF4", "two", 1.0),
        ("FP32", "one", 1.0),
    ]


def test_the_share_of_compressed_macs_leaves_attention_out() -> None:
    ops = [
        Op(name="a", kind="FullyConnected", precision="f32", macs=30, weights="nf4"),
        Op(name="b", kind="MatMulNBits", precision="f32", macs=10),
        Op(name="c", kind="Convolution", precision="i8", macs=10),
        Op(name="d", kind="Convolution", precision="f32", macs=50, weights="f32"),
        Op(name="e", kind="MatMul", precision="f32", macs=100, attention=True, weights="f32"),
        Op(name="f", kind="Softmax", precision="f32"),
    ]
    assert formats.compressed_pct(ops) == 50.0


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"file_bytes": 1, "simulated": False}, True),
        ({"file_bytes": 1, "simulated": True}, False),
        ({"error": "it failed", "file_bytes": 1, "simulated": False}, False),
        ({}, False),
    ],
)
def test_only_what_an_engine_has_kernels_for_is_timed(entry: dict, expected: bool) -> None:
    assert formats.timed(entry) == expected
