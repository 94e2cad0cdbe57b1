import base64
import hashlib
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
import sample

from martlet.core.errors import ArtifactError
from martlet.core.report import Document
from martlet.report import html, units

VOID = {"meta", "link", "img", "br", "hr", "input", "line"}
LOADERS = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "background", "ping", "formaction"}
FAULT = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

make_document = pytest.mark.parametrize("make", sample.ALL)


class Page(HTMLParser):
    """Checks nesting while it collects tags, text and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@make_document
def test_structure(make: sample.Callable[[], Document]) -> None:
    text = html.render(make())
    assert text.startswith("<!doctype html>")
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag in ("html", "head", "body", "h1", "main", "script", "style"):
        assert len(page.find(tag)) == 1, tag
    for link in page.find("a"):
        target = link["href"] or ""
        assert target.startswith("https://arxiv.org/abs/") or target.removeprefix("#") in ids
    assert all(image["alt"] for image in page.find("img"))


@make_document
def test_nothing_is_loaded_from_outside(make: sample.Callable[[], Document]) -> None:
    text = html.render(make())
    page = Page(text)
    for tag, attributes in page.tags:
        for name in LOADERS & set(attributes):
            if tag != "a":
                assert (attributes[name] or "").startswith("data:"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_names_the_script_that_is_there() -> None:
    text = html.render(sample.document())
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [m["content"] for m in Page(text).find("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_hostile_strings_are_text() -> None:
    document = sample.hostile()
    page = Page(html.render(document))
    assert len(page.find("script")) == 1
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,/9j/") for image in page.find("img"))
    shown = sample.HOSTILE.encode("utf-8", "replace").decode()
    # Once for each kind of string that comes from outside, at least.
    assert page.words.count(shown) > 100
    for needle in ("timm:vit_tiny_patch16_224", "imagenet1k-sample/test.parquet", "coho", "tench", "blocks.0.attn.qkv"):
        assert needle + shown in page.words


def test_patches_are_painted_after_each_block_that_reduces() -> None:
    document = sample.document()
    page = Page(html.render(document))
    assert "after blocks.4 : of 12 patches, 6 kept, 6 merged into 2" in page.words
    assert "after blocks.8 : of 12 patches, 0 kept, 11 merged into 4, 1 dropped" in page.words
    shown = [image for image in page.find("img") if (image["alt"] or "").startswith("After blocks")]
    assert len({image["src"] for image in shown}) == 2
    del document["patches"]  # as reports had it before
    assert "patches" not in Page(html.render(document)).words


def test_where_images_left_is_told_and_shown() -> None:
    document = sample.document()
    assert "Where images left" not in Page(html.render(document)).words
    picture = document["examples"][0]["jpeg_base64"]
    document["exits"] = {
        "stages": [
            {"share_pct": 62.5, "top1_pct": 91.25, "gmacs": 0.31, "latency_ms": 2.5},
            {"share_pct": 37.5, "top1_pct": None, "gmacs": 1.25, "latency_ms": 9.75},
        ],
        "mean_gmacs": 0.6625,
        "max_gmacs": 1.25,
        "examples": [
            {"image": "a.png", "label": "tench", "artifact": "coho", "stage": 1, "jpeg_base64": picture},
            {"image": "b.png", "label": None, "artifact": "coho", "stage": 2, "jpeg_base64": picture},
        ],
    }
    page = Page(html.render(document))
    cost, mean = (f"{units.number(gmacs)} GMACs" for gmacs in (0.31, 0.6625))
    for words in ("62.5 %", cost, units.quantity(9.75, "ms"), "stage 1: coho, not tench", f"costs {mean} in the mean"):
        assert words in page.words, words
    assert len([image for image in page.find("img") if "which left after stage" in (image["alt"] or "")]) == 2


def test_every_part_of_the_document_is_on_the_page() -> None:
    document = sample.document()
    words = Page(html.render(document)).words
    for wanted in (
        "2.1× faster, 3.9× smaller, top-1 81.2 → 81.0 % (n = 500) on OpenVINO, 2 threads",
        "14.7 ms 13.8–17.2, n = 240",
        "OpenVINO bf16 reaches 1.45× (1.43–1.48)",
        "98.6 %",
        "0.00431 nats",
        "24.9 dB",
        "Xiao et al., SmoothQuant, 2023",
        "attention_products 24",
        "ranges.mse 98",
        "softmax output 8",
        "i8 95.8 % · f32 4.2 %",
        "OpenVINO runtime model",
        "blocks.10.mlp.fc2 Linear 10.5 dB",
        "/blocks.0/av/MatMul",
        "181 images/s",
        "albatross",
        "n0153/broken.jpg",
        "16.8 GB",
        "2.15.0",
        document["command"],
        "smooth: 0.5",
        "9f3c2a77e01b45d8",
        "1 min 11 s",
        "Kullback–Leibler",
    ):
        assert wanted is not None
        assert wanted in words, wanted
    assert "simulated" not in words


def test_failed_says_so_first() -> None:
    text = html.render(sample.failed())
    assert '<body class="failed">' in text
    words = Page(text).words
    assert "The gate failed: 1.3× slower than the baseline" in words
    assert "Gate passed" not in words
    assert words.index("The gate failed") < words.index("Before and after")


def test_simulated_stands_beside_every_number_it_touches() -> None:
    words = Page(html.render(sample.simulated())).words
    for number in ("6.93 ms 6.51–8.11, n = 240", "181 images/s batch 8", "181 images/s artifact", "5.95 MB", "81.0 %"):
        assert re.search(re.escape(number) + r"\s+simulated", words), number
    for operation in re.findall(r"i8 [\d,.]+ µs [\d.]+ %(.{12})", words):
        assert operation.strip().startswith("simulated")
    assert "× faster" not in words
    assert "× smaller" not in words
    assert "Speed-up over the baseline" not in words


def test_what_is_missing_is_never_a_zero() -> None:
    words = Page(html.render(sample.bare())).words
    assert "None" not in words.replace("None were given", "")
    assert not re.search(r"(?<![\d.,])0(\.0+)? (%|ms|MB|B|images/s|GMACs|points|dB|s)(\s|$)", words)
    for wanted in ("Peak resident memory not measured not measured", "Top-1 not measured not measured"):
        assert wanted in words
    assert words.lower().count("not measured") >= 12
    document = sample.document()
    document["fidelity"] = {"top1_agreement_pct": None, "kl_mean": None, "logit_sqnr_db": None, "n_images": 0}  # type: ignore[typeddict-item]
    document["engine"]["batch"] = None
    document["layers"][4]["sqnr_db"] = None  # type: ignore[typeddict-item]
    words = Page(html.render(document)).words
    assert "same top-1 answer not measured mean KL divergence not measured logit SQNR not measured" in words
    assert "batch not measured" in words
    assert "batch None" not in words
    assert re.search(r"blocks\.0\.attn\.proj Linear not measured", words)


def test_facts_flatten_and_count_what_is_long() -> None:
    assert html.facts({"a": {"b": 1, "memory_bytes": 2_000_000}, "on": True, "mean": [0.5, 0.25], "seed": None}) == [
        ("a.b", "1"),
        ("a.memory_bytes", "2.00 MB"),
        ("on", "yes"),
        ("mean", "0.5, 0.25"),
        ("seed", "not recorded"),
    ]
    assert html.facts({"weights": [["conv", 1, 0]] * 50, "empty": []}) == [
        ("weights", "50 entries, in report.json"),
        ("empty", "none"),
    ]


@pytest.mark.parametrize(
    ("paper", "id"),
    [("A, 2023, arXiv 2211.10438", "2211.10438"), ("arxiv:1712.05877", "1712.05877"), ("none", None)],
)
def test_papers_are_linked_by_their_number(paper: str, id: str | None) -> None:
    assert html.arxiv(paper) == id


def test_write_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    html.write(sample.document(), path)
    html.write(sample.hostile(), path)
    before = path.read_text(encoding="utf-8")
    assert before == html.render(sample.hostile())

    def full(self: Path, text: str, **_: object) -> None:
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        html.write(sample.document(), path)
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_write_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"can't write the page .*No such file or directory"):
        html.write(sample.document(), tmp_path / "absent" / "report.html")


@pytest.mark.skipif(browser.EXECUTABLE is None, reason="no Chromium is installed")
def test_in_a_browser(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, browser.Browser(Path(profile)) as chromium:
        for make in sample.ALL:
            path = tmp_path / f"{make.__name__}.html"
            html.write(make(), path)
            for width in (380, 390, 1280):
                chromium.open(path, width=width)
                assert chromium.complaints == [], (make, width)
                assert chromium.requests == [path.as_uri()]
                assert chromium.evaluate("document.documentElement.clientWidth") == width
                assert chromium.evaluate(FAULT) <= 0, (make, width)
                chromium.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                assert chromium.evaluate(FAULT) <= 0, (make, width)
                assert chromium.evaluate("[...document.images].every(i => i.naturalWidth > 0)")

        chromium.open(tmp_path / "document.html", width=1280)
        light = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
        chromium.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        column = "[...document.querySelectorAll('#time .sortable tbody tr')].map(r => Number(r.cells[4].dataset.value))"
        times = chromium.evaluate(column)
        assert times == sorted(times, reverse=True)
        chromium.evaluate("document.querySelectorAll('#time .sortable button')[4].click()")
        assert chromium.evaluate(column) == sorted(times)
        chromium.open(tmp_path / "document.html", width=1280, dark=True)
        assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") != light
