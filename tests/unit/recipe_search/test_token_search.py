"""The search for a schedule: its arithmetic on latencies that are known, and a whole search on a small model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from martlet import engine
from martlet.core import pipeline
from martlet.core.errors import UsageError
from martlet.core.recipe import Recipe
from martlet.core.technique import Context, silent
from martlet.data import open_images
from martlet.data.calibration import Calibration, First
from martlet.recipe_search.record import Record
from martlet.recipe_search.space import Loss, expected_drop_pct
from martlet.recipe_search.tokens import Table, Tokens
from martlet.source import load_model
from martlet.techniques.tokens.readout import Readout
from martlet.vit.tokens import Taken

DEPTH = 6
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3}


def latency(schedule: dict[int, int], tokens: int = 17, depth: int = DEPTH, bend: int = 8) -> float:
    """Of an imagined engine: 1 ms, 0.1 ms a reduction, and a block's time that is half attention, half MLP."""

    def block(n: int) -> float:
        return 0.1 * n if n > bend else 0.2 * n - 0.1 * bend  # bends where it is measured

    left, total = tokens, 1.0
    for i in range(depth):
        total += block(left) / 2
        if i in schedule:
            left -= schedule[i]
            total += 0.1
        total += block(left) / 2
    return total


def table(rows_ms: list[float] | None = None) -> Table:
    early = {r: latency({0: r}) for r in (3, 9, 12)}
    return Table.of(latency({}), early, (3, 9, latency({3: 9})), rows_ms or [0.0] * 17, DEPTH)


@pytest.mark.parametrize("schedule", [{}, {0: 9}, {2: 3}, {4: 12}, {1: 3, 3: 6}, {0: 3, 2: 6, 4: 3}, {1: 9, 2: 3}])
def test_few_times_tell_all(schedule: dict[int, int]) -> None:
    assert table().latency_ms(tuple(schedule.items())) == pytest.approx(latency(schedule))


def test_what_rows_take_is_told_between_the_models_that_were_timed() -> None:
    """An engine on which an odd number of tokens takes a block 0.3 ms longer, which lines between times can't tell."""

    def odd(schedule: dict[int, int]) -> float:
        left, more = 17, 0.0
        for i in range(DEPTH):
            more += 0.15 * (left % 2)
            left -= schedule.get(i, 0)
            more += 0.15 * (left % 2)
        return latency(schedule) + more

    early = {r: odd({0: r}) for r in (3, 9, 12)}
    times = odd({}), early, (3, 9, odd({3: 9}))
    told = Table.of(*times, [0.3 * ((17 - r) % 2) for r in range(17)], DEPTH)
    for schedule in ({2: 3}, {2: 4}, {1: 5}, {1: 3, 3: 6}, {1: 2, 4: 3}):
        assert told.latency_ms(tuple(schedule.items())) == pytest.approx(odd(schedule))
    assert Table.of(*times, [0.0] * 17, DEPTH).latency_ms(((2, 4),)) != pytest.approx(odd({2: 4}), rel=0.02)


def test_the_table_can_be_wrong() -> None:
    found = table()
    assert found.fixed_ms == pytest.approx(0.1)
    assert found.latency_ms(((1, 9),)) != pytest.approx(latency({2: 9}))
    assert found._replace(fixed_ms=0.0).latency_ms(((1, 9),)) != pytest.approx(latency({1: 9}))


def test_expected_drop_is_what_labels_drawn_from_the_model_give() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((400, 5))
    logits = reference + rng.standard_normal((400, 5))
    p = np.exp(reference) / np.exp(reference).sum(1, keepdims=True)
    drops = []
    for _ in range(400):
        labels = np.array([rng.choice(5, p=row) for row in p])
        drops.append(100 * ((reference.argmax(1) == labels).mean() - (logits.argmax(1) == labels).mean()))
    assert expected_drop_pct(reference, logits) == pytest.approx(np.mean(drops), abs=0.5)
    assert expected_drop_pct(reference, reference) == 0
    assert expected_drop_pct(reference, -reference) > 20


def model():
    torch.manual_seed(0)
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(12)]


def test_a_model_taken_apart_gives_what_it_gave() -> None:
    source = model()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        taken = Taken(source)
        before = taken.before(x)
        assert len(before) == 6
        torch.testing.assert_close(taken.logits(x, before[-1]), source.module(x))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An engine whose times are those of `latency`; says what was timed."""
    timed: list[str] = []

    def times(self, models):
        found = {}
        for name, one in models.items():
            removed = next((dict(s.record["removed"]) for s in one.steps if "removed" in s.record), {})
            timed.append(str(removed))
            found[name] = latency(removed, depth=4, bend=11)
        return found

    monkeypatch.setattr(Tokens, "times", times)
    monkeypatch.setattr(Tokens, "rows", lambda self, counts: dict.fromkeys(counts, 0.0))
    return timed


def space(path: Path, technique: str = "tps", n: int = 12) -> Tokens:
    """All that is known of schedules after timing and judging."""
    source, target = model(), engine.get("openvino")
    pool = Calibration(open_images(images()), source.preprocess, n=n)
    data = json.loads(path.read_text()) if path.exists() else {}
    recipe = Recipe.load(technique)
    found = Tokens(source, recipe, 0, target, pool, First(pool, 4), 1, 0, silent, Record(path, data))
    found.time()
    found.judge()
    return found


def test_a_front_is_measured_once(tmp_path: Path, clock: list[str]) -> None:
    path = tmp_path / "tps.json"
    found = space(path)
    assert len(clock) == 4
    front = found.front()
    assert [found.latency_ms(s) for s in front] == sorted(found.latency_ms(s) for s in front)
    for schedule in front:
        assert found.latency_ms(schedule) == pytest.approx(latency(dict(schedule), depth=4, bend=11))
    every = {s: loss.kl for s, loss in found.losses.items()}
    beaten = [s for s in every if any(every[o] < every[s] and found.latency_ms(o) < found.latency_ms(s) for o in every)]
    assert beaten
    assert set(front).isdisjoint(beaten)
    assert any(len(s) > 1 for s in every)
    [technique] = found.candidate(front[0]).passes
    assert technique.settings()["r"] == dict(front[0])
    assert found.candidate(()).passes == (Readout(),)
    clock.clear()
    assert space(path).front() == front
    assert clock == []


def test_a_loss_is_that_of_the_model_that_reduces(tmp_path: Path, clock: list[str]) -> None:
    found = space(tmp_path / "tps.json")
    schedule = found.front()[0]
    reduced = pipeline.run(found.source, found.candidate(schedule), Context())
    with torch.inference_mode():
        pairs = [(found.source.module(x).numpy(), reduced.module(x).numpy()) for x in found.pool]
    loss = Loss.of(*(np.concatenate(parts) for parts in zip(*pairs, strict=True)))
    assert found.losses[schedule].kl == pytest.approx(loss.kl, rel=1e-3)


@pytest.mark.slow
def test_an_engine_that_simulates_has_no_times() -> None:
    source = model()
    pool = Calibration(open_images(images()), source.preprocess, n=4)
    recipe, target = Recipe.load("tokens-int8"), engine.get("torch")
    found = Tokens(source, recipe, 1, target, pool, pool, 1, 0, silent, Record(Path("unused.json"), {}))
    with pytest.raises(UsageError, match="torch only simulates this recipe"):
        found.time()
