import pytest
import sample

from martlet.core.report import Document
from martlet.report import verdict
from martlet.report.units import MISSING


def test_passed() -> None:
    assert verdict.headline(sample.document()) == (
        "2.1× faster, 3.9× smaller, top-1 81.2 → 81.0 % (n = 500) on OpenVINO, 2 threads"
    )
    assert verdict.gate(sample.document()) == "Gate passed"


def test_failed_says_why_and_still_gives_the_numbers() -> None:
    headline = verdict.headline(sample.failed())
    assert headline.startswith("The gate failed: 1.3× slower than the baseline; top-1 fell 2.4 points")
    assert verdict.gate(sample.failed()) == headline
    assert verdict.measured(sample.failed()).startswith("1.3× slower, 3.9× smaller, top-1 81.2 → 78.8 %")
    assert verdict.headline(sample.document(gate={"passed": False, "reasons": [], "judged": []})).endswith(
        "it gave no reason"
    )


def test_without_labels_the_two_are_compared_with_each_other() -> None:
    sentence = verdict.headline(sample.unlabelled())
    assert "same answer as the original on 98.6 % of images (n = 500, no labels)" in sentence
    assert "top-1" not in sentence


def test_simulated_claims_no_speed_and_no_size() -> None:
    sentence = verdict.headline(sample.simulated())
    assert sentence.startswith("Simulated, so no claim about speed or size")
    assert "Top-1 81.2 → 81.0 %" in sentence
    assert "OpenVINO has no kernels" in sentence
    assert verdict.gate(sample.simulated()) == "Gate passed (speed was not judged: it is simulated)"
    rows = {row.name: row for row in verdict.rows(sample.simulated())}
    for name in ("Latency, median", "Best throughput", "File size", "Weights"):
        assert rows[name].simulated
        assert rows[name].change == "no claim"
    assert rows["Top-1"].simulated
    assert not rows["Peak resident memory"].simulated
    assert not any("faster" in row.change or "smaller" in row.change for row in rows.values())
    assert not any(row.simulated for row in verdict.rows(sample.document()))


@pytest.mark.parametrize(
    ("speedup", "words"),
    [
        ((2.12, 2.07, 2.18), "2.1× faster"),
        ((0.77, 0.74, 0.81), "1.3× slower"),
        ((1.01, 0.99, 1.02), "as fast as before (within the spread)"),
    ],
)
def test_a_difference_inside_the_spread_is_none(speedup: tuple[float, float, float], words: str) -> None:
    median, low, high = speedup
    assert verdict.faster({"median": median, "low": low, "high": high}) == words


def test_one_thread_is_singular_and_an_unknown_engine_keeps_its_name() -> None:
    document = sample.document()
    document["engine"] |= {"name": "tensorrt", "threads": 1}
    assert verdict.place(document) == "on tensorrt, 1 thread"


def test_in_what_floats_run_and_why() -> None:
    document = sample.document()
    assert verdict.floats(document) == "Floating-point parts run in f32"
    step = {**document["recipe"]["steps"][0], "name": "bf16", "record": {"precision": "f32"}}
    document["recipe"]["steps"].append(step)
    assert verdict.floats(document) == "Floating-point parts run in f32: OpenVINO has no fast bf16 on this machine"
    document["artifact"]["precision"] = step["record"]["precision"] = "bf16"
    assert verdict.floats(document) == "Floating-point parts run in bf16"


@pytest.mark.parametrize("make", [sample.bare, sample.unlabelled])
def test_what_was_not_measured_is_no_number(make: sample.Callable[[], Document]) -> None:
    rows = {row.name: row for row in verdict.rows(make())}
    for name in ("Top-1", "Top-5", "Peak resident memory"):
        assert rows[name].artifact == MISSING
        assert rows[name].change == ""
        assert not rows[name].worse


def test_what_got_worse_is_marked() -> None:
    document = sample.failed()
    document["artifact"]["file_bytes"] = 2 * document["baseline"]["file_bytes"]
    rows = {row.name: row for row in verdict.rows(document)}
    assert {name for name, row in rows.items() if row.worse} == {"Latency, median", "Top-1", "Top-5", "File size"}
    assert rows["File size"].change == "2.0× larger"


def test_a_plain_alternative_that_is_faster_is_named() -> None:
    assert verdict.plainer(sample.document()) == ""
    faster = {
        "name": "openvino bf16, not quantized",
        "latency_ms": {"median": 5.0, "p05": 4.9, "p95": 5.2, "n": 100},
        "speedup": {"median": 2.5, "low": 2.4, "high": 2.6},
    }
    found = sample.document(alternatives=[faster])
    assert verdict.plainer(found).startswith("Faster on this machine: openvino bf16, not quantized (2.50x")
    assert found["speedup"] is not None
    unsure = faster | {"speedup": {"median": 2.5, "low": found["speedup"]["high"], "high": 2.6}}
    assert verdict.plainer(sample.document(alternatives=[unsure])) == ""  # the intervals touch
    assert verdict.plainer(sample.simulated()) == ""
