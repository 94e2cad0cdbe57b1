"""Generated documentation is current, and a stale file is named."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from martlet.core import recipe, registry
from martlet.core.facts import Fact

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def docs():
    """tools/docs.py, which is no part of the package."""
    sys.path.insert(0, str(ROOT / "tools"))  # as if it were run
    spec = importlib.util.spec_from_file_location("docs", ROOT / "tools" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path, docs) -> Path:
    """A copy of what is generated, current, without results."""
    shutil.copy(ROOT / "README.md", tmp_path)
    assert docs.main([], tmp_path) == 0
    return tmp_path


def document(created: str, median: float) -> dict:
    """The least of a benchmark's document."""
    entry = {
        "name": "openvino int8 (Martlet)",
        "latency_ms": {"median": median, "p05": 1.0, "p95": 9.0, "n": 10},
        "speedup_over_nncf": {"median": 1.25, "low": 1.1, "high": 1.4},
    }
    return {
        "benchmark": "peers",
        "created": created,
        "environment": {"cpu": "a CPU", "cores": 2, "versions": {"torch": "9.9"}},
        "models": [{"name": "a_model", "entries": [entry, {"name": "torch fp32 (eager)", "error": "failed"}]}],
    }


def test_generated_files_are_current(docs, capsys):
    assert docs.main(["--check"], ROOT) == 0, capsys.readouterr().err


def test_every_technique_is_in_the_catalog(docs):
    text = docs.techniques()
    for entry in registry.entries().values():
        assert f"[`{entry.name}`](../src/martlet/techniques/{entry.family}/{entry.name}.py)" in text
        assert entry.summary in text


@pytest.mark.parametrize("name", ["docs/techniques.md", "README.md"])
def test_a_stale_file_is_named_and_not_written(docs, root, name, capsys):
    (root / "results").mkdir()
    (root / "results" / "peers.json").write_text(json.dumps(document("2026", 1.0)))
    assert docs.main([], root) == 0
    path = root / name
    path.write_text(re.sub("int8|a_model", "int7", path.read_text()))
    stale = path.read_text()
    assert docs.main(["--check"], root) == 1
    assert f"{name} is stale: run `make docs`" in capsys.readouterr().err
    assert path.read_text() == stale


def test_the_table_shows_the_newest_results_and_nothing_that_failed(docs, root):
    (root / "results").mkdir()
    for name, created, median in (("b", "2026-01-01", 7.777), ("a", "2026-02-02", 5.555)):
        (root / "results" / f"{name}.json").write_text(json.dumps(document(created, median)))
    assert docs.main([], root) == 0
    text = (root / "README.md").read_text()
    assert "| `a_model` | 5.55 | – | 1.25 (1.10–1.40) |" in text.replace("5.56", "5.55")
    assert "7.78" not in text
    assert docs.main(["--check"], root) == 0


def test_the_page_of_pruning_ranks_by_accuracy_and_names_what_failed(docs):
    where = {"environment": {"cpu": "a cpu", "cores": 2, "versions": {"torch": "2"}}}
    entry = {"prune_ratio": 0.4, "macs_removed_ratio": 0.401, "parameters": 3_460_000, "cpu_seconds": 7.0, **where}
    entries = [
        entry | {"name": "worse", "top1_pct": 1.8},
        {"name": "broken", "prune_ratio": 0.4, "failed": "RuntimeError: sizes", **where},
        entry | {"name": "better", "top1_pct": 50.0},
        entry | {"name": "Torch-Pruning best", "top1_pct": 30.0},
        entry | {"name": "better, int8", "top1_pct": 60.0},
        entry | {"name": "trained", "top1_pct": 75.0, "training": {"minutes": 10.0}},
        entry | {"name": "less", "prune_ratio": 0.2, "top1_pct": 70.0},
    ]
    speed = {"median": 1.25, "low": 1.2, "high": 1.4}
    its = {"median": 5.0, "p05": 4.0, "p95": 6.0, "n": 9}
    latency = [{"name": "better, int8", "threads": 1, "macs_removed_ratio": 0.4, "latency_ms": its, "speedup": speed}]
    claim = {"claim": "A claim", "parameters": 2_000_000, "zeros_ratio": 0.25, "macs_removed_ratio": 0.0}
    model = {
        "name": "a_model",
        "model": "timm:a_model",
        "weights": "w",
        "images": {"calibration": "these", "test": "those"},
        "parameters": 5_000_000,
        "macs": 1_000_000,
        "base_top1_pct": 81.2,
        "n": 500,
        "entries": entries,
        "latency": {"models": latency, **where},
        "claims": {"models": [claim | {"name": "one", "top1_pct": 9.0}], **where},
    }
    [pruning] = [module for module in docs.results_pages() if module.BENCHMARK == "prune"]
    page = pruning.page({"settings": {"calibration_images": 3}, "models": [model]})
    order = [
        page.index(text)
        for text in (
            "20% fewer",
            "| less",
            "40% fewer",
            "| trained, 10 minutes",
            "| better | 40.1%",
            "| worse",
            "| broken",
        )
    ]
    assert order == sorted(order)
    assert "| 3.46 M | 50.0 | 7 |" in page
    assert "RuntimeError: sizes | – | – | – |" in page
    assert "`better` is 20.0 points above the best of Torch-Pruning's." in page  # neither rounded nor trained
    assert "| better, int8 | 1 | 40.0% | 5.00 | 1.25 (1.20–1.40) × | 0.50 |" in page
    assert "| one | 2.00 M | 25.0% | 0.0% | 9.0 |" in page
    assert page.rstrip().endswith("torch 2 (9).")


def test_without_results_there_is_no_table(docs, root):
    text = (root / "README.md").read_text()
    assert f"{docs.BEGIN}\n{docs.END}" in text


def test_a_readme_without_markers_is_refused(docs, tmp_path):
    (tmp_path / "README.md").write_text("# Martlet")
    with pytest.raises(ValueError, match=r"README\.md has no <!-- results:peers -->"):
        docs.main([], tmp_path)


def test_wrong_use(docs, capsys):
    assert docs.main(["--chek"]) == 2
    assert "usage: python tools/docs.py [--check]" in capsys.readouterr().err


def test_every_shipped_recipe_is_in_the_catalog_and_the_readmes_are_as_they_are():
    catalog = (ROOT / "docs/techniques.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([^`]+)` \| (`[^:]+`): ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(rows) > 5
    for name in recipe.shipped():
        passes = ", ".join(f"`{technique.name}`" for technique in recipe.Recipe.load(name).passes)
        assert f"[`{name}`](../src/martlet/recipes/{name}.yaml) | {passes} | " in catalog
        assert dict(rows).get(name, passes) == passes
    assert {name for name, _ in rows} <= set(recipe.shipped())


def test_the_readmes_recipe_is_one():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert recipe.Recipe.from_yaml(example).facts() == {Fact.ALL_TOKENS, Fact.WHOLE_LINEARS, Fact.ONE_EXIT}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/techniques.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (path.parent / link).exists()]
    assert not missing


def few_bits_document() -> dict:
    environment = {"cpu": "a CPU", "cores": 2, "versions": {"torch": "9.9"}}
    entry = {"model": "a_model", "weights": "file a", "top1_float_pct": 80.0, "n": 500, "environment": environment}
    return {
        "benchmark": "ptq",
        "settings": {"calibration_images": 128, "seed": 0},
        "entries": [
            entry
            | {"recipe": "uniform-w4a4", "top1_pct": 1.25, "sqnr_db": 0.5, "seconds": 3.0}
            | {"peak_rss_bytes": 2_150_000_000},
            entry
            | {"recipe": "uniform-w8a8", "top1_pct": 79.5, "sqnr_db": 30.25, "seconds": 4.0}
            | {"grid_images": "first"},
            entry | {"recipe": "martlet-w4a4", "top1_pct": 66.0, "sqnr_db": 9.0, "seconds": 250.0},
            entry | {"recipe": "adalog-w4a4", "error": "it failed"},
        ],
    }


def test_the_page_of_few_bits_has_every_number(docs, root):
    (root / "results").mkdir()
    (root / "results" / "ptq.json").write_text(json.dumps(few_bits_document()))
    assert docs.main(["--check"], root) == 1
    assert docs.main([], root) == 0
    text = (root / "docs" / "few-bits.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows == [
        "| Recipe | W8A8 | W4A4 | Seconds | Peak GB |",
        "| --- | --- | --- | --- | --- |",
        "| `martlet` | – | 66.0 (9.0) | 250 | – |",
        "| `uniform` | 79.5† (30.2) | 1.2 (0.5) | 3 | 2.1 |",
        "| `adalog` | – | failed | – | – |",
    ]
    assert "Measured on a CPU with 2 core(s), torch 9.9 (4)." in text
    assert "`adalog-w4a4` failed: it failed." in text
    assert "weren't kept" not in text
    assert "simulated" in text
    assert "† Measured when" in text
    assert docs.main(["--check"], root) == 0


def test_other_weights_and_other_machines_are_kept_apart(docs, root):
    found = few_bits_document()
    other = found["entries"][0] | {"weights": "file 0", "weights_kept": False, "top1_pct": 9.0}
    found["entries"].append(other | {"environment": other["environment"] | {"cpu": "another CPU"}})
    (root / "results").mkdir()
    (root / "results" / "ptq.json").write_text(json.dumps(found))
    assert docs.main([], root) == 0
    text = (root / "docs" / "few-bits.md").read_text()
    lost, kept = (part.splitlines() for part in text.split("## a_model")[1:])
    assert [line for line in lost if line.startswith("| `")] == ["| `uniform` | 9.0 (0.5) | 3 | 2.1 |"]
    assert [line.startswith("file") and "weren't kept" in line for line in (lost[2], kept[2])] == [True, False]
    assert "| `uniform` | 79.5† (30.2) | 1.2 (0.5) | 3 | 2.1 |" in kept
    assert "torch 9.9 (4); on another CPU with 2 core(s), torch 9.9 (1)." in text


def test_the_page_of_studies_has_means_and_ranges_of_draws(docs, root):
    document = few_bits_document()
    entry = {"model": "a_model", "study": "rounding", "top1_float_pct": 80.0, "n": 500, "seconds": 3.0, "draw": 0}
    entry |= {"environment": document["entries"][0]["environment"]}
    found = document | {
        "benchmark": "studies",
        "entries": [
            entry | {"recipe": "nearest", "top1_pct": 70.0, "sqnr_db": 10.0},
            entry | {"recipe": "learned", "top1_pct": 72.0, "sqnr_db": 12.0},
            entry | {"recipe": "learned", "top1_pct": 75.0, "sqnr_db": 13.0, "seconds": 5.0, "draw": 1},
            entry | {"study": "bridges", "recipe": "broken", "error": "it failed"},
        ],
    }
    (root / "results").mkdir()
    (root / "results" / "studies.json").write_text(json.dumps(found))
    assert docs.main([], root) == 0
    text = (root / "docs" / "few-bits-studies.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        "| `broken` | 1 | failed: it failed | – | – |",
        "| `nearest` | 1 | 70.0 | 10.0 | 3 |",
        "| `learned` | 2 | 73.5 (72.0–75.0) | 12.5 (12.0–13.0) | 4 (3–5) |",
    ]
    [questions] = [module.QUESTIONS for module in docs.results_pages() if module.BENCHMARK == "studies"]
    assert all(question in text for name, question in questions.items() if name in ("bridges", "rounding"))


def formats_document() -> dict:
    """Three formats on two engines: one is fast and loses too much, one is simulated, one can't."""
    size = {"FP32": 20_000_000, "BF16": 20_000_000, "INT8": 5_000_000, "NF4": 2_500_000}
    top1 = {"FP32": 80.0, "BF16": 79.5, "INT8": 78.9, "NF4": 79.2}
    speed = {"FP32": 1.0, "BF16": 1.5, "INT8": 2.0}

    def entry(form: str, engine: str) -> dict:
        names = {"model": "a_model", "weights": "file a", "data": "images", "format": form, "engine": engine}
        if (form, engine) == ("BF16", "other"):
            return names | {"error": "no such type"}
        simulated = engine == "other" and form == "NF4"
        found = names | {"simulated": simulated, "file_bytes": size[form]}
        found |= {"top1_pct": top1[form], "agreement_pct": 97.0} if engine == "one" else {"accuracy_of": "one"}
        if form in speed and not simulated:
            ratio = {"median": speed[form], "low": speed[form] - 0.1, "high": speed[form] + 0.1}
            found |= {"latency_ms": {"median": 10 / speed[form]}, "speedup_over_fp32": ratio, "threads": 2}
            found |= {"compressed_macs_pct": 98.0 if form == "INT8" else 0.0}
        return found

    return {
        "benchmark": "formats",
        "environment": {"cpu": "a CPU", "cores": 2, "versions": {"torch": "9.9"}},
        "settings": {"test_images": 1000, "calibration_images": 64, "seed": 0},
        "entries": [entry(form, engine) for engine in ("one", "other") for form in size],
    }


def test_the_guide_to_formats_follows_from_the_numbers(docs, root):
    (root / "results").mkdir()
    results = root / "results" / "formats.json"
    found = formats_document()

    def page() -> str:
        results.write_text(json.dumps(found))
        assert docs.main([], root) == 0
        assert docs.main(["--check"], root) == 0
        return (root / "docs" / "formats.md").read_text()

    text = page()
    assert "- **one**, for speed: **BF16** (on 1 of 1 models)." in text  # INT8 is faster, and loses 1.1 points
    assert "- **one**, for a small file: **NF4** (on 1 of 1 models)." in text
    assert "- **other**, for speed: **FP32**" in text
    assert "- **other**, for a small file: **FP32**" in text  # NF4 is simulated there
    assert "| INT8 | 78.9 | 97.0 | 5.0 | 4.0 × | 5.00 | 2.00 (1.90–2.10) | 98 |" in text
    assert "| NF4 | 79.2 | 97.0 | 2.5 | 8.0 × | simulated | – | – |" in text
    assert "| BF16 | can't: no such type |" in text
    for entry in found["entries"]:
        entry |= {"top1_pct": 79.1} if entry["format"] == "INT8" and entry["engine"] == "one" else {}
    text = page()
    assert "- **one**, for speed: **INT8** (on 1 of 1 models)." in text
    assert "- **other**, for a small file: **INT8**" in text
