"""The picture of efficiency: areas are MACs, and the line is the machine's."""

import pytest

from martlet.core.errors import ArtifactError
from martlet.report import efficiency as page


def layer(name: str, kind: str, macs: int, moved: int, us: float, pct: float) -> dict:
    times = {"microseconds": us, "efficiency_pct": pct, "attainable_pct": 50.0}
    return {"name": name, "kind": kind, "macs": macs, "bytes": moved, **times}


FOUND = {
    "engine": "openvino",
    "threads": 2,
    "peak_gmacs_per_s": 1.0,
    "bandwidth_gb_per_s": 0.25,
    "waterline_macs_per_byte": 3.0,
    "latency_ms": 0.1,
    "operations_ms": 0.09,
    "efficiency_pct": 35.0,
    "other_microseconds": 10.0,
    "layers": [
        layer("stem", "conv", 30_000, 2_000, 60.0, 50.0),
        layer("dw<1>", "depthwise", 5_000, 5_000, 20.0, 25.0),
    ],
}


def test_areas_of_the_gap_are_macs():
    scale, blocks = page.gap(FOUND)
    assert scale.high == 100
    assert [(b.left, b.width, b.height) for b in blocks] == [(0.0, 60.0, 50.0), (60.0, 20.0, 25.0)]
    areas = [b.width * b.height for b in blocks]
    assert areas[0] / areas[1] == 30_000 / 5_000
    assert sum(areas) / (100 * 100) == pytest.approx(FOUND["efficiency_pct"] / 100)


def test_what_needs_more_of_memory_is_under_the_water():
    scale, line, (conv, depthwise) = page.waterline(FOUND)
    assert scale.at(2) == line  # log2(1 + 3)
    assert conv.height == scale.at(4) > line  # log2(1 + 15)
    assert depthwise.height == scale.at(1) < line  # log2(1 + 1)
    assert conv.width / depthwise.width == pytest.approx(6, rel=1e-3)
    assert depthwise.left == conv.width


def test_the_page_shows_every_layer_and_asks_for_nothing():
    text = page.render("net & co", FOUND)
    assert "<h1>net &amp; co</h1>" in text
    assert text.count("<rect") == 4
    assert text.count('class="worst"') == 2  # the depthwise convolution, in each chart
    assert ">15 MACs/B</span>" in text  # the top of the scale, 2⁴ - 1
    assert "dw&lt;1&gt;" in text
    assert "dw<1>" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_it_is_written_beside_and_then_renamed(tmp_path):
    page.write("net", FOUND, tmp_path / "net.html")
    assert [file.name for file in tmp_path.iterdir()] == ["net.html"]
    with pytest.raises(ArtifactError, match="can't write the page"):
        page.write("net", FOUND, tmp_path / "nowhere" / "net.html")
