"""The search for a schedule: its arithmetic on latencies that are known, and a whole search on a small model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from martlet.core.errors import ArtifactError, RecipeError, UsageError
from martlet.core.recipe import Recipe
from martlet.recipe_search import expected_drop_pct, search
from martlet.recipe_search.tokens import Table, Tokens
from martlet.source import load_model
from martlet.vit.tokens import Taken

DEPTH = 6
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3}


def latency(schedule: dict[int, int], tokens: int = 17, depth: int = DEPTH) -> float:
    """Of an imagined engine: 1 ms, 0.1 ms a reduction, and a block's time that is half attention, half MLP."""

    def block(n: int) -> float:
        return 0.1 * n if n > 8 else 0.2 * n - 0.8  # bends where it is measured

    left, total = tokens, 1.0
    for i in range(depth):
        total += block(left) / 2
        if i in schedule:
            left -= schedule[i]
            total += 0.1
        total += block(left) / 2
    return total


def table() -> Table:
    early = {r: latency({0: r}) for r in (3, 9, 12)}
    return Table.of(latency({}), early, (3, 9, latency({3: 9})), DEPTH)


@pytest.mark.parametrize("schedule", [{}, {0: 9}, {2: 3}, {4: 12}, {1: 3, 3: 6}, {0: 3, 2: 6, 4: 3}, {1: 9, 2: 3}])
def test_few_times_tell_all(schedule: dict[int, int]) -> None:
    assert table().latency_ms(tuple(schedule.items())) == pytest.approx(latency(schedule))


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
            found[name] = latency(removed, depth=4)
        return found

    monkeypatch.setattr(Tokens, "times", times)
    return timed


def run(out: Path, **kwargs: object):
    settings = {"recipe": "tps", "num_images": 12, "num_calib": 4, "max_drop": 100.0} | kwargs
    return search(model(), images=images(), out=out, **settings)  # type: ignore[arg-type]


def test_a_search_ends_in_a_recipe_and_goes_on_where_it_stopped(tmp_path: Path, clock: list[str]) -> None:
    out = tmp_path / "found.yaml"
    found = run(out)
    assert Recipe.load(str(out)) == found.recipe
    [technique] = found.recipe.passes
    schedule = technique.settings()["r"]
    assert found.latency_ms == pytest.approx(latency(schedule, depth=4))
    record = json.loads(out.with_suffix(".json").read_text())
    fastest = min(record["losses"], key=lambda key: latency(yaml.safe_load(f"{{{key}}}"), depth=4))
    assert schedule == yaml.safe_load(f"{{{fastest}}}")  # any loss is allowed
    assert any(len(yaml.safe_load(f"{{{key}}}")) > 1 for key in record["losses"])
    clock.clear()
    again = run(out)
    assert again.recipe == found.recipe
    assert clock == []  # nothing is measured twice
    record["measured"].popitem()
    out.with_suffix(".json").write_text(json.dumps(record))
    assert run(out).recipe == found.recipe
    assert len(clock) == 1


@pytest.mark.slow
def test_the_budgets(tmp_path: Path, clock: list[str]) -> None:
    slow = run(tmp_path / "a.yaml", max_drop=None, max_ms=0.97 * latency({}, depth=4))
    fast = run(tmp_path / "b.yaml", max_drop=None, max_ms=0.9 * latency({}, depth=4))
    assert fast.latency_ms < slow.latency_ms <= 0.97 * latency({}, depth=4)
    with pytest.raises(UsageError, match=r"no schedule that was compressed keeps 0\.1 ms \(.*\); allow more"):
        run(tmp_path / "c.yaml", max_drop=None, max_ms=0.1)
    assert not (tmp_path / "c.yaml").exists()


def test_bad_use(tmp_path: Path) -> None:
    out = tmp_path / "found.yaml"
    for budgets in ({"max_drop": None}, {"max_drop": 1.0, "max_ms": 2.0}):
        with pytest.raises(UsageError, match="needs one budget"):
            run(out, **budgets)
    with pytest.raises(UsageError, match=r"must end in \.yaml, not 'found'"):
        run(tmp_path / "found")
    with pytest.raises(RecipeError, match=r"such as tokens-int8 or int8; fuse \| bf16.* has nothing"):
        run(out, recipe="bf16")
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists; add --overwrite"):
        run(out)
    out.unlink()
    out.with_suffix(".json").write_text("[]")
    with pytest.raises(ArtifactError, match="is no record of a search"):
        run(out)
    out.with_suffix(".json").write_text(json.dumps({"martlet_search": 1, "job": {}}))
    with pytest.raises(UsageError, match="is of a search with another model"):
        run(out)


@pytest.mark.slow
def test_an_engine_that_simulates_has_no_times(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torch only simulates this recipe"):
        run(tmp_path / "found.yaml", engine="torch", recipe="tokens-int8")
