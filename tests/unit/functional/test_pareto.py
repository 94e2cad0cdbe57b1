"""Fronts and hypervolumes against slow counting in plain Python."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from martlet.functional.pareto import front, hypervolume


def beaten(points: list[tuple[float, ...]], i: int, *, strictly: bool = True) -> bool:
    """By the definition. strictly=False forgets that a dominating point is somewhere better."""
    for j, other in enumerate(points):
        no_worse = all(a <= b for a, b in zip(other, points[i], strict=True))
        if j != i and no_worse and (other != points[i] or not strictly):
            return True
    return False


def counted(points: list[tuple[int, ...]], reference: tuple[int, ...]) -> int:
    """How many unit cubes below the reference some point dominates; whole numbers only."""
    cubes = itertools.product(*(range(min(c[d] for c in points), reference[d]) for d in range(len(reference))))
    return sum(any(all(a <= c for a, c in zip(point, cube, strict=True)) for point in points) for cube in cubes)


WHOLE = st.integers(1, 4).flatmap(lambda d: st.lists(st.tuples(*[st.integers(0, 4)] * d), min_size=1, max_size=8))


@given(WHOLE)
def test_as_by_the_definition(points):
    assert front(np.array(points)).tolist() == [not beaten(points, i) for i in range(len(points))]
    reference = (5,) * len(points[0])
    assert Fraction(hypervolume(np.array(points), reference)) == counted(points, reference)


def test_the_definition_can_tell_a_fault():
    points = [(1.0, 2.0), (1.0, 2.0), (3.0, 0.0)]
    assert front(np.array(points)).tolist() == [True, True, True]
    assert [not beaten(points, i, strictly=False) for i in range(3)] == [False, False, True]


def test_what_is_worse_than_the_reference_adds_nothing():
    points = np.array([[1.0, 1.0], [0.0, 9.0]])
    assert hypervolume(points, (2.0, 3.0)) == pytest.approx(2.0)
    assert hypervolume(points[1:], (2.0, 3.0)) == 0.0
    assert hypervolume(np.empty((0, 2)), (2.0, 3.0)) == 0.0


def test_what_is_not_a_number_is_on_no_front_and_beats_nothing():
    points = np.array([[math.nan, 0.0], [1.0, 1.0], [0.5, math.nan]])
    assert front(points).tolist() == [False, True, False]
    assert hypervolume(points, (2.0, 2.0)) == 1.0
