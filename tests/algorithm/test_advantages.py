"""Advantages against hand-derived tables."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchrl.algorithm.advantages import group_advantages


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        # mean 1/2, sample variance (1/4 + 1/4) / 1 = 1/2
        ([1.0, 0.0], [0.5 / (math.sqrt(0.5) + 1e-6), -0.5 / (math.sqrt(0.5) + 1e-6)]),
        # mean 1/4, sample variance (9/16 + 3/16) / 3 = 1/4, std 1/2
        ([1.0, 0.0, 0.0, 0.0], [0.75 / 0.500001] + [-0.25 / 0.500001] * 3),
        # mean 2, sample variance (1 + 0 + 1) / 2 = 1
        ([1.0, 2.0, 3.0], [-1 / 1.000001, 0.0, 1 / 1.000001]),
    ],
)
def test_table(rewards: list[float], expected: list[float]) -> None:
    advantages = group_advantages(rewards)
    assert advantages == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    "rewards",
    [[], [1.0], [0.0] * 4, [0.1] * 7, [0.1 + 0.2, 0.3, 0.3], [1.0, 1.0 + 1e-9]],
    ids=["empty", "single", "all wrong", "all equal", "equal up to rounding", "within tolerance"],
)
def test_no_signal(rewards: list[float]) -> None:
    assert group_advantages(rewards) is None


def test_small_variance_is_signal() -> None:
    assert group_advantages([1.0, 1.0 + 1e-6]) is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_reward_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages([1.0, bad])


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12))
def test_centred_and_order_preserving(rewards: list[float]) -> None:
    advantages = group_advantages(rewards)
    if advantages is None:
        assert statistics.stdev(rewards) <= 1e-7
        return
    # The rounding error of r - mean is divided by a std that may be as small as the epsilon.
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-8)
    assert statistics.stdev(advantages) <= 1.0 + 1e-9
    pairs = zip(rewards, advantages, strict=True)
    assert [a for _, a in sorted(pairs)] == sorted(advantages)
