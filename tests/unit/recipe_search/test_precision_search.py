"""The search for layers that stay in floating point: its arithmetic by brute force, and searches on a small model."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from martlet import engine
from martlet.core.errors import UsageError
from martlet.core.model import Model
from martlet.core.recipe import Recipe
from martlet.core.technique import silent
from martlet.data import open_images
from martlet.data.calibration import Calibration, First
from martlet.data.preprocess import Preprocess
from martlet.engine.base import Op
from martlet.recipe_search.precision import Precision, Times, unit_times
from martlet.recipe_search.record import Record
from martlet.recipe_search.space import Loss
from martlet.source import load_model

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
LAYERS = ("attn.qkv", "attn.scores, attn.values", "attn.proj", "mlp.fc1", "mlp.fc2")
UNITS = 2 + 2 * len(LAYERS)
FIXED, INT8_US = 2000.0, 100.0
"""Microseconds of an imagined engine: of what is no multiplication, and of each unit in int8."""


def float_us(place: int) -> float:
    """Of a unit in floating point; one of them is faster there."""
    return 70.0 if place == 4 else 110.0 + 40 * (place % 4)


def call_ms(left: set[int]) -> float:
    """Of a whole call: each microsecond of operations takes 1.25 of the clock's."""
    extra = sum(float_us(i) - INT8_US for i in left)
    return (FIXED + UNITS * INT8_US + 1.25 * extra) / 1000


def times() -> Times:
    halves = [set(range(half, UNITS, 2)) for half in (0, 1)]
    by_unit = [[float_us(i) if i in half else INT8_US for i in range(UNITS)] for half in halves]
    return Times.of(call_ms(set()), [call_ms(half) for half in halves], [INT8_US] * UNITS, by_unit)


@pytest.mark.parametrize("left", [(), (0,), (3, 4), (1, 2, 11), tuple(range(UNITS))])
def test_three_models_tell_all_latencies(left: tuple[int, ...]) -> None:
    assert times().latency_ms(left) == pytest.approx(call_ms(set(left)))
    assert times()._replace(scale=1.0).latency_ms((3,)) != pytest.approx(call_ms({3}))


def test_where_floating_point_is_as_fast_the_clock_is_the_operations() -> None:
    assert Times.of(5.0, [5.001, 4.99], [100.0, 100.0], [[99.0, 100.0], [100.0, 102.0]]).scale == 1


def every_choice() -> list[tuple[int, ...]]:
    return [c for n in range(UNITS + 1) for c in itertools.combinations(range(UNITS), n)]


@pytest.mark.parametrize("extra", [0.0, 0.03, 0.1, 0.4])
def test_the_choice_is_the_best_of_all(extra: float) -> None:
    errors = np.random.default_rng(1).lognormal(0, 1.5, UNITS).tolist()
    table = times()
    budget = table.base_ms + extra
    found = table.choose(errors, budget)

    def left(chosen: tuple[int, ...]) -> float:
        return sum(errors) - sum(errors[i] for i in chosen)

    within = [c for c in every_choice() if table.latency_ms(c) <= budget + 1e-9]
    assert len(within) < 2**UNITS
    assert table.latency_ms(found) <= budget + 1e-6
    assert left(found) == pytest.approx(min(map(left, within)))
    assert 4 in found  # it is faster so
    with pytest.raises(ValueError, match="fits the budgets"):
        table.choose(errors, table.latency_ms((4,)) - 0.001)


def test_points_reach_from_the_fastest_to_floating_point() -> None:
    points = times().points()
    assert points[0] == pytest.approx(call_ms({4}))
    assert points == sorted(points)
    assert 0.9 * call_ms(set(range(UNITS))) < points[-1] < call_ms(set(range(UNITS)))
    assert times().choose([1.0] * UNITS, points[0]) == (4,)


def test_an_operation_that_runs_several_layers_shares_its_time() -> None:
    units = [("a",), ("b.scores", "b.values"), ("c",), ("d",)]
    ops = [
        Op(name="a", kind="FullyConnected", precision="i8", macs=5, microseconds=3.0),
        Op(name="b.scores + b.values", kind="Subgraph", precision="i8", macs=5, microseconds=4.0),
        Op(name="c.pieces.0", kind="Convolution", precision="f32", macs=5, microseconds=1.0),
        Op(name="c.pieces.1", kind="Convolution", precision="f32", macs=5, microseconds=1.5),
        Op(name="a + d", kind="FullyConnected", precision="i8", macs=5, microseconds=2.0),
        Op(name="d", kind="Eltwise", precision="f32", microseconds=100.0),
        Op(name="elsewhere", kind="MatMul", precision="f32", macs=7, microseconds=9.0),
    ]
    assert unit_times(ops, units) == [4.0, 4.0, 2.5, 1.0]


@pytest.mark.parametrize(("n", "skipped", "sizes"), [(5, 0, [3, 2]), (4, 4, [2, 2]), (9, 6, [2]), (3, 0, [3])])
def test_some_of_the_images(n: int, skipped: int, sizes: list[int]) -> None:
    class Eight:
        num_images = 8

        def __iter__(self):
            yield from torch.arange(8.0).split(3)

    found = list(First(Eight(), n, skipped))
    assert [len(part) for part in found] == sizes
    assert torch.cat(found).tolist() == list(range(8))[skipped:][:n]
    assert First(Eight(), n, skipped).num_images == sum(sizes)


def model() -> Model:
    torch.manual_seed(0)
    return load_model("timm:vit_tiny_patch16_224", model_kwargs=TINY, num_classes=10, seed=3)


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(12)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """An engine whose times are those of `call_ms`; says what was timed."""
    timed: list[tuple[int, ...]] = []
    order = [name for i in range(2) for layer in LAYERS for name in _names(i, layer)]
    order = ["patch_embed.proj", *order, "head"]

    def left(one: Model) -> set[int]:
        record = next((s.record for s in one.steps if "quantized" in s.record), None)
        names = order if record is None else record.get("in_floating_point", [])
        found = {place(name) for name in names}
        timed.append(tuple(sorted(found)))
        return found

    def clock(self, models):
        floats = [left(one) for one in models.values()]
        places = [place(unit[0]) for unit in self.units]
        us = [[float_us(i) if i in its else INT8_US for i in places] for its in floats]
        return [call_ms(its) for its in floats], us

    monkeypatch.setattr(Precision, "clock", clock)
    return timed


def _names(block: int, layer: str) -> list[str]:
    return [f"blocks.{block}.{name}" for name in layer.split(", ")]


def place(name: str) -> int:
    """Of a layer among the units."""
    if not name.startswith("blocks"):
        return 0 if name == "patch_embed.proj" else UNITS - 1
    _, block, layer = name.split(".", 2)
    return 1 + int(block) * len(LAYERS) + next(i for i, names in enumerate(LAYERS) if layer in names.split(", "))


PLAIN = "shift: false, smooth: false, split: false, bias_correction: false, ranges: minmax"
"""Quick: the search doesn't depend on how int8 rounds."""


def space(path: Path, left: str = "", one: Model | None = None) -> Precision:
    """All that is known of choices of layers after timing and judging."""
    recipe = Recipe.from_yaml(
        f"martlet: 1\npasses:\n  - fuse\n  - int8: {{{PLAIN}{left}}}\n  - bf16: {{required: false}}"
    )
    source = one or model()
    pool = Calibration(open_images(images()), source.preprocess, n=12)
    data = json.loads(path.read_text()) if path.exists() else {}
    target = engine.get("openvino")
    found = Precision(source, recipe, 1, target, pool, First(pool, 4), 1, 0, silent, Record(path, data))
    found.time()
    found.judge()
    return found


def test_a_front_is_measured_once_and_goes_on_where_it_stopped(tmp_path: Path, clock: list) -> None:
    path = tmp_path / "int8.json"
    found = space(path)
    assert len(clock) == 3
    front = found.front()
    assert [found.latency_ms(c) for c in front] == sorted(found.latency_ms(c) for c in front)
    assert [found.latency_ms(c) for c in front] == pytest.approx([call_ms(set(c)) for c in front])
    losses = [found.losses[found.text(c)].kl for c in front]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 5
    assert all(4 in c for c in front)  # it is faster so
    assert found.record.data["units"][2] == ["blocks.0.attn.scores", "blocks.0.attn.values"]
    assert len(found.errors) == len(found.units) == UNITS
    assert all(error > 0 for error in found.errors)
    assert sum(found.errors) - found.errors[4] == pytest.approx(found.losses[found.text((4,))].kl, rel=0.5)
    recipe = found.candidate(front[1])
    assert [t.name for t in recipe.passes] == ["fuse", "int8", "bf16"]
    assert {place(name) for name in recipe.passes[1].settings()["float_layers"]} == set(front[1])
    clock.clear()
    data = json.loads(path.read_text())
    assert space(path).front() == front
    assert clock == []  # nothing is measured twice
    errors = data.pop("errors")
    data["losses"].popitem()
    path.write_text(json.dumps(data))
    assert space(path).front() == front
    assert json.loads(path.read_text())["errors"] == pytest.approx(errors)


def test_what_a_choice_loses_is_what_its_model_loses(tmp_path: Path, clock: list) -> None:
    found = space(tmp_path / "int8.json")
    chosen = found.front()[-1]
    rounded = found.compressed(chosen, found.calibration)
    judged = First(found.pool, 64)
    with torch.inference_mode():
        pairs = [(found.source.module(x).numpy(), rounded.module(x).numpy()) for x in judged]
    loss = Loss.of(*(np.concatenate(parts) for parts in zip(*pairs, strict=True)))
    assert found.losses[found.text(chosen)].kl == pytest.approx(loss.kl, rel=0.1)
    assert found.losses[found.text((4,))].kl != pytest.approx(loss.kl, rel=0.1)


def test_layers_that_the_recipe_leaves_stay_and_are_no_choice(tmp_path: Path, clock: list) -> None:
    found = space(tmp_path / "int8.json", ", float_layers: [blocks.0, head]")
    units = [name for unit in found.units for name in unit]
    assert not [name for name in units if name.startswith("blocks.0") or name == "head"]
    settings = found.candidate(found.front()[-1]).passes[1].settings()
    assert settings["float_layers"][:2] == ("blocks.0", "head")
    assert settings["smooth"] is False


def test_one_layer_leaves_nothing_to_choose(tmp_path: Path, clock: list) -> None:
    module = nn.Sequential(nn.Conv2d(3, 10, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    one = Model(name="one", module=module.eval(), preprocess=Preprocess(size=(32, 32)), num_classes=10, origin={})
    with pytest.raises(UsageError, match="int8 rounds one layer of one, so there is nothing to choose"):
        space(tmp_path / "one.json", one=one)
