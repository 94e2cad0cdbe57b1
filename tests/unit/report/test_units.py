import math

import pytest

from martlet.report import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (0.0, "0"),
        (6.9314, "6.93"),
        (104.4, "104"),
        (12_500, "12,500"),
        (0.0031234, "0.00312"),
        (-7.5, "−7.50"),
        (math.inf, "∞"),
        (math.nan, "NaN"),
    ],
)
def test_a_number_keeps_three_digits(value: float | None, text: str) -> None:
    assert units.number(value) == text


def test_nothing_measured_is_never_zero() -> None:
    for word in (units.size(None), units.count(None), units.duration(None), units.percent(None)):
        assert word == units.MISSING
    assert units.quantity(None, "ms") == units.MISSING


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (5_951_210, "5.95 MB"), (999_600, "1.00 MB"), (16_777_216_000, "16.8 GB")],
)
def test_bytes_are_decimal(value: int, text: str) -> None:
    assert units.size(value) == text


def test_minutes_only_where_there_are_some() -> None:
    assert [units.duration(s) for s in (0.412, 41.2, 60.0, 192.4)] == ["0.412 s", "41.2 s", "1 min 0 s", "3 min 12 s"]


def test_percentages_have_the_decimals_that_their_images_deserve() -> None:
    assert units.percent(81.234, 500) == "81.2 %"
    assert units.percent(81.234, 50_000) == "81.23 %"
    assert units.points(81.2, 81.0, 500) == "−0.2 points"
    assert units.points(81.20, 81.22, 500) == "no change"
    assert units.points(81.20, 81.22, 50_000) == "+0.02 points"


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (39, 10, "3.9× smaller"),
        (10, 39, "3.9× larger"),
        (104, 100, "1.04× smaller"),
        (100, 100.2, "same"),
        (0, 0, "same"),
        (0, 5, "0 → 5.00"),
        (120, 10, "12× smaller"),
    ],
)
def test_comparisons_say_which_way(before: float, after: float, text: str) -> None:
    assert units.compared(before, after, "smaller", "larger", "same") == text
