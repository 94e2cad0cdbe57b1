"""The explorer of a search: what it says, that nothing in it runs, and what it does in a real browser."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import browser
import pytest
import search_sample
from test_html import FAULT, Page

from martlet.core.errors import ArtifactError
from martlet.report import pareto

TITLE = "timm:vit_tiny_patch16_224 · search · Martlet"
needs_browser = pytest.mark.skipif(browser.EXECUTABLE is None, reason="no Chromium is installed")


def data(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_front_is_what_nothing_measured_beats():
    document = search_sample.document()
    axes = {axis.key: axis for axis in pareto.axes(document)}
    ids = [p["id"] for p in pareto.front(document, axes["latency_ms"], axes["drop_pct"])]
    assert ids == [5, 4, 3, 6]
    up = [p["id"] for p in pareto.front(document, axes["top1_pct"], axes["latency_ms"])]
    assert up == ids  # the best of top-1, where higher is better, is the slowest
    for point in document["points"]:
        point["stage"] = "screened"
    assert [p["id"] for p in pareto.front(document, axes["latency_ms"], axes["drop_pct"])] == [11]
    document["points"] = [p for p in document["points"] if p["simulated"]]
    assert pareto.front(document, axes["latency_ms"], axes["drop_pct"]) == []


def test_a_budget_is_a_line_on_each_axis_that_it_bounds():
    document = search_sample.document()
    assert pareto.limits(document) == pytest.approx(
        {"top1_pct": 73.6, "drop_pct": 1.0, "latency_ms": 8.0, "file_bytes": 6.5}
    )
    document["job"]["budget"] = {"max_drop_pct": None, "latency_ms": None, "size_mb": 3.0}
    assert pareto.limits(document) == {"file_bytes": 3.0}


def test_the_table_has_everything_without_javascript():
    text = pareto.render(search_sample.document())
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    for words in (
        "int8, r = 4 keeps the budget",
        "6.40 ms (6.14–6.66)",
        "46.1 MB",
        "1 candidate lost",
        "screened on 64",
        "No point of NNCF fp4: there is none <i>.",
        "found 9.50 points·ms, references and peers 6.25; 9.75 with both",
    ):
        assert words in page.words
    assert "runs/search/7.yaml" in page.words
    assert "tome: {r: 4}" in page.words
    assert len(re.findall(r'class="simulated">', text)) == 1


def test_names_stay_names():
    text = pareto.render(search_sample.document())
    assert len(re.findall(r"</script>", text)) == 3  # the data and two scripts
    assert "<img" not in text
    assert "the worker was killed &lt;b&gt;" in text
    points = {p["id"]: p for p in data(text)["points"]}
    assert points[6]["label"].endswith(search_sample.EVIL)


def test_what_is_missing_or_no_number_is_left_out_and_said():
    document = search_sample.document()
    del document["points"][3]["values"]["latency_ms"]
    document["points"][7]["values"]["latency_ms"]["value"] = float("nan")
    for point in document["points"]:
        point["winner"] = False
    text = pareto.render(document)
    points = {p["id"]: p for p in data(text)["points"]}
    assert "latency_ms" not in points[3]["values"]
    assert "latency_ms" not in points[7]["values"]
    assert "NaN" not in text
    assert "not measured" in Page(text).words
    assert "Nothing was found yet." in text
    assert pareto.chosen([axis for axis in pareto.axes(document) if axis.key != "latency_ms"])[0].key == "file_bytes"
    with pytest.raises(ValueError, match="two axes"):
        pareto.chosen(pareto.axes(document)[:1])


def test_no_point_that_keeps_the_budget_is_said():
    document = search_sample.document()
    document["points"][4]["keeps_budget"] = False
    assert "int8, r = 4 is the nearest; no point keeps the budget" in pareto.headline(document)


def test_it_is_written_beside_and_then_renamed(tmp_path):
    pareto.write_page(search_sample.document(), tmp_path / "search.html")
    assert [file.name for file in tmp_path.iterdir()] == ["search.html"]
    with pytest.raises(ArtifactError, match="can't write the page"):
        pareto.write_page(search_sample.document(), tmp_path / "nowhere" / "search.html")


@needs_browser
def test_the_explorer_in_a_browser(tmp_path: Path) -> None:
    document, path = search_sample.document(), tmp_path / "search.html"
    pareto.write_page(document, path)
    axes = {axis.key: axis for axis in pareto.axes(document)}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        browser.Browser(Path(profile)) as chromium,
    ):

        def get(selector: str, what: str) -> Any:
            return chromium.evaluate(f"document.querySelector({json.dumps(selector)}).{what}")

        def count(selector: str) -> int:
            return chromium.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")

        def choose(select: str, key: str) -> None:
            chromium.evaluate(f"{{ {select}.value = '{key}'; {select}.dispatchEvent(new Event('change')); }}")

        def told() -> str:
            return get("#detail", "innerText")

        for width, dark in ((480, False), (480, True), (1280, False)):
            chromium.open(path, width=width, dark=dark)
            assert (
                chromium.evaluate(f"new Promise(r => requestAnimationFrame(() => setTimeout(r))).then(() => {FAULT})")
                <= 0
            )
            assert count(".mark") == 11
            assert chromium.complaints == []
            assert chromium.requests == [path.as_uri()]
            assert chromium.evaluate("document.title") == TITLE  # no name ran

        # What is drawn: the front, limits, marks by kind, bars; what collapsed is outside until it is asked for.
        for x, y in (("file_bytes", "top1_pct"), ("top1_pct", "memory_bytes"), ("latency_ms", "drop_pct")):
            choose("x", x)
            choose("y", y)
            front = [str(p["id"]) for p in pareto.front(document, axes[x], axes[y])]
            assert get(".front", "dataset.ids").split() == front, (x, y)
            assert count(".limit") == len({x, y} & {*pareto.limits(document)})
        assert count(".mark.peer") == 2
        assert count(".mark.reference") == 1
        assert get("[data-id='9']", "className.baseVal") == "mark candidate measured hollow pretended"
        assert count("[data-id='4'] .spread") == 2
        assert count("[data-id='10']") == 0
        assert "1 point lies outside" in get("#outside", "innerText")
        chromium.click("#all")
        assert count("[data-id='10']") == 1
        chromium.click("#all")

        # Marks stand where their numbers are: further right is slower, further up is more of the drop.
        fast, plain, original = (
            [float(get(f"[data-id='{i}'] .hit", f"getAttribute('{name}')")) for name in ("cx", "cy")] for i in (5, 3, 0)
        )
        assert fast[0] < plain[0] < original[0]
        assert fast[1] < plain[1] < original[1]

        # Hover tells, a click pins and shows the command, another mark doesn't take its place, Escape lets go.
        chromium.hover("[data-id='9'] .hit")
        assert "gptq-w3 simulated" in told()
        assert "compress" not in told()
        chromium.click("[data-id='6'] .hit")
        assert search_sample.EVIL in told()
        assert "tome: {r: 4}" in told()
        assert document["points"][6]["command"] in told()
        chromium.hover("[data-id='9'] .hit")
        assert "gptq-w3" not in told()
        chromium.allow_clipboard()
        chromium.click("#detail button")
        assert chromium.evaluate("navigator.clipboard.readText()") == document["points"][6]["command"]
        assert get("#detail button", "innerText") == "Copied"
        chromium.click("[data-id='6'] .hit")
        assert "compress" not in told()

        # The keyboard goes along the axis; one mark alone is in the order of tabs.
        assert count(".mark[tabindex='0']") == 1
        get("[data-id='5']", "focus()")
        chromium.press("ArrowRight")
        assert "int8, r = 4" in told()
        assert "compress" not in told()
        chromium.press("Enter")
        assert document["points"][4]["command"] in told()
        assert get("[data-id='4']", "ariaPressed") == "true"
        assert chromium.evaluate("document.activeElement.dataset.id") == "4"
        chromium.press("Escape")
        assert "compress" not in told()
        assert chromium.evaluate("document.title") == TITLE
        assert chromium.complaints == []

        chromium.open(path, width=480, javascript=False)
        assert get("#explorer", "checkVisibility()") is False
        assert get("#points tbody", "checkVisibility()") is True
