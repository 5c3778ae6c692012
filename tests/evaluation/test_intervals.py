"""Intervals against published values, against one another, and by how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from searchrl.evaluation.intervals import bootstrap, percentile_interval, ratios, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3, to four digits.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_against_published_values(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert interval.value == successes / n
    assert interval.low == pytest.approx(low, abs=6e-5)
    assert interval.high == pytest.approx(high, abs=6e-5)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_s_ends_solve_the_score_equation(n: int, share: float) -> None:
    """Its definition: the proportions p whose score test just rejects, |x/n - p| = z sqrt(p(1-p)/n)."""
    successes = round(share * n)
    interval = wilson(successes, n)
    assert 0 <= interval.low <= interval.value + 1e-12
    assert interval.value - 1e-12 <= interval.high <= 1
    for end in (interval.low, interval.high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(successes / n - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), abs=1e-9)


Floats = NDArray[np.float64]


def shares(numerators: Floats, denominators: Floats, truth: float, *, seed: int = 1) -> tuple[float, float]:
    """How many of the intervals, one for each column, hold the truth, and their mean width."""
    values = ratios(numerators.sum(axis=0), denominators.sum(axis=0))
    replicates = bootstrap(numerators, denominators, seed=seed, name="t")
    intervals = [percentile_interval(float(v), r) for v, r in zip(values, replicates.T, strict=True)]
    held = [interval.low <= truth <= interval.high for interval in intervals]
    return float(np.mean(held)), float(np.mean([interval.high - interval.low for interval in intervals]))


def test_bootstrap_intervals_of_a_proportion_hold_it_as_often_as_they_say() -> None:
    """600 evaluations of 200 questions, of which three in ten are answered."""
    right = (np.random.default_rng(0).random((200, 600)) < 0.3).astype(np.float64)
    held, width = shares(right, np.ones_like(right), 0.3)
    assert 0.92 <= held <= 0.975
    expected = wilson(60, 200)
    assert width == pytest.approx(expected.high - expected.low, rel=0.05)


def test_answers_to_one_question_are_not_taken_for_independent() -> None:
    """Eight answers to each of 100 questions, easy ones and hard ones: their spread counts."""
    rng = np.random.default_rng(0)
    difficulty = rng.beta(0.5, 0.5, (100, 400))
    right = rng.binomial(8, difficulty).astype(np.float64)
    held, width = shares(right, np.full_like(right, 8.0), 0.5)
    assert 0.92 <= held <= 0.975
    answers = wilson(400, 800)
    assert width > 1.8 * (answers.high - answers.low)


def test_a_ratio_of_sums_is_resampled_by_question() -> None:
    """Recall of a search: questions with more searches weigh more, and find less."""
    rng = np.random.default_rng(0)
    searches = rng.integers(0, 4, (150, 400)).astype(np.float64)
    found = rng.binomial(searches.astype(np.int64), np.where(searches > 1, 0.3, 0.7)).astype(np.float64)
    truth = (0.7 * 1 + 0.3 * 2 + 0.3 * 3) / (1 + 2 + 3)
    held, _ = shares(found, searches, truth)
    assert 0.92 <= held <= 0.975


@pytest.mark.parametrize(("successes", "n"), [(90, 300), (2000, 5000), (30, 60)])
def test_the_bootstrap_is_near_wilson(successes: int, n: int) -> None:
    right = np.zeros((n, 1))
    right[:successes] = 1.0
    replicates = bootstrap(right, np.ones_like(right), seed=0, name="t")
    interval, expected = percentile_interval(successes / n, replicates[:, 0]), wilson(successes, n)
    assert interval.low == pytest.approx(expected.low, abs=0.25 * (expected.high - expected.low) / 4)
    assert interval.high == pytest.approx(expected.high, abs=0.25 * (expected.high - expected.low) / 4)


def test_seed_and_name_fix_the_resamples() -> None:
    values = np.random.default_rng(0).random((20, 2))
    ones = np.ones_like(values)
    first = bootstrap(values, ones, seed=0, name="nq")
    assert np.array_equal(first, bootstrap(values, ones, seed=0, name="nq"))
    assert not np.array_equal(first, bootstrap(values, ones, seed=1, name="nq"))
    assert not np.array_equal(first, bootstrap(values, ones, seed=0, name="popqa"))


def test_resamples_without_a_search_are_left_out_not_counted_as_zero() -> None:
    found, searches = np.array([[1.0], [0.0], [0.0]]), np.array([[1.0], [0.0], [0.0]])
    replicates = bootstrap(found, searches, seed=0, name="t")
    assert 0.2 < np.isnan(replicates).mean() < 0.4  # (2/3)^3 of them draw the first question never
    interval = percentile_interval(1.0, replicates[:, 0])
    assert (interval.low, interval.high) == (1.0, 1.0)
