"""Exact feature sums, for every split and every order."""

import functools
import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_pipeline.errors import DamageError
from ddpm_pipeline.features.distances import frechet_distance, moments_of
from ddpm_pipeline.features.exact_sums import Sums, sums_of
from tests.effort import examples
from tests.evaluate.made import vectors


@pytest.mark.parametrize("workers", [2, 7])
def test_any_number_of_workers_gives_the_same_bits(workers: int) -> None:
    x = vectors(1001, 20)
    parts = [sums_of(part) for part in np.array_split(x, workers)]
    forward = functools.reduce(operator.add, parts)
    backward = functools.reduce(operator.add, reversed(parts))
    whole = sums_of(x)
    assert forward.to_text() == backward.to_text() == whole.to_text()
    assert forward.moments().covariance.tobytes() == whole.moments().covariance.tobytes()


@examples(25)
@given(st.permutations(range(30)), st.integers(1, 29))
def test_order_and_splits_change_nothing(order: list[int], cut: int) -> None:
    x = vectors(30, 4)
    shuffled = x[np.array(order)]
    assert sums_of(shuffled[:cut]) + sums_of(shuffled[cut:]) == sums_of(x)


def test_sums_are_those_of_whole_numbers() -> None:
    x = np.round(vectors(50, 3) * 2**22) / 2**22
    exact = [[sum(int(a * 2**22) * int(b * 2**22) for a, b in zip(x[:, i], x[:, j], strict=True)) for j in range(3)]
             for i in range(3)]  # fmt: skip
    found = sums_of(x)
    for i in range(3):
        for j in range(3):
            total = (int(found.high[i, j]) << 36) + (int(found.cross[i, j]) << 18) + int(found.low[i, j])
            assert total == exact[i][j]


def test_moments_are_those_of_numpy() -> None:
    x = vectors(700, 12, shift=3.0)
    moments, expected = sums_of(x).moments(), moments_of(x)
    np.testing.assert_allclose(moments.mean, expected.mean, atol=1e-6)
    np.testing.assert_allclose(moments.covariance, expected.covariance, rtol=1e-6, atol=1e-6)
    assert frechet_distance(moments, expected) < 1e-6


def test_sums_round_trip_as_text() -> None:
    found = sums_of(vectors(40, 9))
    read = Sums.from_text(found.to_text())
    assert read == found
    assert read.moments().covariance.tobytes() == found.moments().covariance.tobytes()
    with pytest.raises(DamageError, match="feature sums"):
        Sums.from_text(found.to_text()[:-8])


def test_what_cannot_be_added_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        sums_of(np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match="beyond"):
        sums_of(np.array([[1e5, 1.0]]))
    with pytest.raises(ValueError, match="features"):
        _ = sums_of(vectors(5, 3)) + sums_of(vectors(5, 4))
    with pytest.raises(ValueError, match="two"):
        sums_of(vectors(1)).moments()


@pytest.mark.parametrize(("count", "features"), [(0, 2), (-1, 2), (3, 0)])
def test_sums_of_nothing_are_refused(count: int, features: int) -> None:
    square = np.zeros((features, features), np.int64)
    sums = Sums(count, np.zeros(features, np.int64), square, square, square)
    with pytest.raises(DamageError, match="its numbers are out of range"):
        Sums.from_text(sums.to_text())
