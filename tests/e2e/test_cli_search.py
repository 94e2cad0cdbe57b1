"""`martlet search`, and what becomes of what it found."""

import json

import pytest

from martlet.core.recipe import Recipe
from martlet.recipe_search import precision, space

DIGITS = ("martlet:digit_vit", "--images", "martlet:digits", "--threads", 1)


@pytest.mark.slow
def test_layers_that_stay_in_floating_point_from_the_budget_to_the_artifact(martlet, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "TRIES", 1)
    monkeypatch.setattr(space, "SECONDS", 0.2)
    out = tmp_path / "found.yaml"
    search = ("search", *DIGITS, "--num-images", 32, "--num-calib", 8, "--recipe", "int8", "--out", out)
    result = martlet(*search, "--max-ms", 1000)
    assert result.status == 0, result.err
    document = json.loads(out.with_suffix(".json").read_text())
    measured = document["measured"]
    assert f"Recipe  {out}" in result.out
    assert "with all in int8" in " ".join(result.out.split())
    found = Recipe.load(str(out))
    names = found.passes[1].settings()["float_layers"]
    known = [name for unit in document["units"] for name in unit]
    assert set(names) < set(known)
    assert len(document["errors"]) == len(document["units"]) == 22
    entry = measured[", ".join(names)]
    assert entry["kl"] < measured[""]["kl"]
    assert entry["latency_ms"] > 0
    artifact = tmp_path / "digits"
    compress = ("compress", *DIGITS, "--num-calib", 8, "--recipe", out, "--out", artifact, "--json")
    report = json.loads(martlet(*compress, "--limit", 32).out)
    [record] = [step["record"] for step in report["recipe"]["steps"] if step["name"] == "int8"]
    assert record["in_floating_point"] == [name for name in known if name in names]
    floating = {op["name"] for op in report["artifact"]["coverage"]["ops"] if op["gmacs"] and op["precision"] != "i8"}
    assert {part for name in floating for part in name.split(" + ")} >= set(names)
    assert report["bits"]["linear_weight"] != "8"


def test_bad_use_is_one_line(martlet, tiny, images, tmp_path):
    out = tmp_path / "found.yaml"
    search = ("search", *tiny, "--images", images, "--out", out)
    none = martlet(*search, "--recipe", "int8")
    assert none.status == 2
    assert none.err.startswith("martlet: a search needs one budget: max_drop in points of top-1, or max_ms")
    nothing = martlet(*search, "--recipe", "bf16", "--max-drop", 1)
    assert nothing.status == 2
    assert "such as tokens-int8 or int8; fuse | bf16 has nothing" in nothing.err
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("martlet: 1\npasses:\n  - int8: {float_layers: [blocks.0.mlp.fc3]}")
    unknown = martlet(*search, "--recipe", recipe, "--max-drop", 1, "--num-calib", 4)
    assert unknown.status == 2
    assert "names 'blocks.0.mlp.fc3', and timm:vit_tiny_patch16_224 has no such layer; did you mean" in unknown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml"]
