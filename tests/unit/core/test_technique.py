"""Settings are strict: only known keys, only values of the field's type."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import pytest

from martlet.core.errors import RecipeError
from martlet.core.model import Model
from martlet.core.technique import Context, Stage, Technique


@dataclass(frozen=True, kw_only=True)
class Sample(Technique):
    """A technique with a field of every kind."""

    name: ClassVar[str] = "sample"
    stage: ClassVar[Stage] = Stage.MODULE
    summary: ClassVar[str] = "does nothing"

    rate: float = 0.5
    count: int = 3
    exact: bool = True
    mode: str = "mse"

    def apply_(self, model: Model, context: Context) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("settings", [{}, {"rate": 1}, {"rate": 0.25, "count": 7}, {"exact": False, "mode": "x"}])
def test_settings_round_trip(settings: Mapping[str, Any]):
    technique = Sample.from_settings(settings)
    assert technique.settings() == settings
    assert Sample.from_settings(technique.settings()) == technique


def test_settings_leave_defaults_out():
    assert Sample(rate=0.5, count=4).settings() == {"count": 4}


def test_unknown_key_names_the_nearest_and_all():
    with pytest.raises(RecipeError) as error:
        Sample.from_settings({"ratee": 1.0}, "my.yaml: passes[0]")
    assert str(error.value) == (
        "my.yaml: passes[0]: sample has no setting 'ratee'; did you mean rate? (known: rate, count, exact, mode)"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("rate", "0.5"), ("rate", True), ("count", 1.5), ("count", True), ("exact", 1), ("exact", "yes"), ("mode", 3)],
)
def test_a_value_of_another_type_is_refused(key, value):
    with pytest.raises(RecipeError, match=rf"sample\.{key} takes a \w+, not {value!r} \(\w+\)"):
        Sample.from_settings({key: value})


def test_a_technique_is_immutable_and_hashable():
    technique = Sample()
    with pytest.raises(FrozenInstanceError):
        technique.rate = 0.1  # type: ignore[misc]
    assert len({technique, Sample(), Sample(rate=0.1)}) == 2


def test_calibration_without_images_says_what_to_give():
    with pytest.raises(RecipeError, match=r"sample needs calibration images; give some with --calib or --images"):
        Context().calibration(Sample())


def test_restoring_is_refused_where_it_is_not_written(seed):
    with pytest.raises(NotImplementedError, match=r"sample changes structure and has no restore_"):
        Sample().restore_(None, {})  # type: ignore[arg-type]
