"""Advantages against hand-derived tables, and against definitions written out loop by loop."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchrl.algorithm.advantages import compute_advantages, has_signal
from searchrl.config import AdvantageConfig, AdvantageKind

GROUP_RELATIVE = ["grpo", "dr_grpo", "rloo"]
NO_SIGNAL = {
    "single": [1.0],
    "all wrong": [0.0] * 4,
    "all equal": [0.1] * 7,
    "equal up to rounding": [0.1 + 0.2, 0.3, 0.3],
    "within tolerance": [1.0, 1.0 + 1e-9],
}


def run(
    kind: str,
    groups: Sequence[Sequence[float]],
    *,
    zero_variance_filter: bool = True,
    custom: Callable[[Sequence[Sequence[float]]], Sequence[Sequence[float]]] | None = None,
) -> list[list[float] | None]:
    config = AdvantageConfig(kind=AdvantageKind(kind))
    return compute_advantages(groups, config, zero_variance_filter=zero_variance_filter, custom=custom)


@pytest.mark.parametrize(
    ("kind", "rewards", "expected"),
    [
        # mean 1/2, sample variance (1/4 + 1/4) / 1 = 1/2
        ("grpo", [1.0, 0.0], [0.5 / (math.sqrt(0.5) + 1e-6), -0.5 / (math.sqrt(0.5) + 1e-6)]),
        # mean 1/4, sample variance (9/16 + 3/16) / 3 = 1/4, std 1/2
        ("grpo", [1.0, 0.0, 0.0, 0.0], [0.75 / 0.500001] + [-0.25 / 0.500001] * 3),
        # mean 2, sample variance (1 + 0 + 1) / 2 = 1
        ("grpo", [1.0, 2.0, 3.0], [-1 / 1.000001, 0.0, 1 / 1.000001]),
        ("dr_grpo", [1.0, 0.0, 0.0, 0.0], [0.75, -0.25, -0.25, -0.25]),
        ("dr_grpo", [1.0, 2.0, 6.0], [-2.0, -1.0, 3.0]),
        # the others' mean: 0 for the first, 1/3 for the rest
        ("rloo", [1.0, 0.0, 0.0, 0.0], [1.0, -1 / 3, -1 / 3, -1 / 3]),
        # the others' means: 4, 3.5, 1.5
        ("rloo", [1.0, 2.0, 6.0], [-3.0, -1.5, 4.5]),
        # of a single group, the batch's statistics are the group's
        ("reinforce_pp", [1.0, 2.0, 3.0], [-1 / 1.000001, 0.0, 1 / 1.000001]),
    ],
)
def test_one_group(kind: str, rewards: list[float], expected: list[float]) -> None:
    (advantages,) = run(kind, [rewards])
    assert advantages == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("zero_variance_filter", "expected"),
    [
        # [1, 1] and [] leave. Of 0, 2, 1, 1, 1, 4: mean 3/2, variance (9 + 1 + 1 + 1 + 1 + 25)/4 / 5 = 1.9
        (True, ([-1.5, 0.5], None, None, [-0.5, -0.5, -0.5, 2.5], math.sqrt(1.9))),
        # Of 0, 2, 1, 1, 1, 1, 1, 4: mean 11/8, squares (121 + 25 + 5·9 + 441)/64 = 9.875, over 7
        (False, ([-11 / 8, 5 / 8], [-3 / 8] * 2, None, [-3 / 8] * 3 + [21 / 8], math.sqrt(9.875 / 7))),
    ],
)
def test_reinforce_pp_standardises_over_the_groups_that_stay(
    zero_variance_filter: bool,
    expected: tuple[list[float], list[float] | None, None, list[float], float],
) -> None:
    *centred, std = expected
    groups = [[0.0, 2.0], [1.0, 1.0], [], [1.0, 1.0, 1.0, 4.0]]
    advantages = run("reinforce_pp", groups, zero_variance_filter=zero_variance_filter)
    for actual, values in zip(advantages, centred, strict=True):
        assert actual == (
            None if values is None else pytest.approx([value / (std + 1e-6) for value in values], rel=1e-12)
        )


def reference(kind: str, groups: list[list[float]]) -> list[list[float]]:
    """The definitions, one reward at a time, for groups that all stay and vary."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def std(values: list[float]) -> float:
        return math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))

    batch = [reward for group in groups for reward in group]
    result = []
    for group in groups:
        row = []
        for i, reward in enumerate(group):
            if kind == "grpo":
                row.append((reward - mean(group)) / (std(group) + 1e-6))
            elif kind == "dr_grpo":
                row.append(reward - mean(group))
            elif kind == "rloo":
                row.append(reward - mean(group[:i] + group[i + 1 :]))
            else:
                row.append((reward - mean(batch)) / (std(batch) + 1e-6))
        result.append(row)
    return result


varying_groups = st.lists(
    st.lists(st.floats(-10, 10), min_size=2, max_size=8).filter(lambda group: max(group) - min(group) > 0.01),
    max_size=4,
)


@pytest.mark.parametrize("kind", [*GROUP_RELATIVE, "reinforce_pp"])
@given(groups=varying_groups, zero_variance_filter=st.booleans())
def test_equals_the_definition(kind: str, groups: list[list[float]], zero_variance_filter: bool) -> None:
    advantages = run(kind, groups, zero_variance_filter=zero_variance_filter)
    assert len(advantages) == len(groups)
    for actual, expected in zip(advantages, reference(kind, groups), strict=True):
        assert actual == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12))
def test_centred_and_order_preserving(rewards: list[float]) -> None:
    (advantages,) = run("grpo", [rewards])
    if advantages is None:
        assert statistics.stdev(rewards) <= 1e-7
        return
    # The rounding error of r - mean is divided by a std that may be as small as the epsilon.
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-8)
    assert statistics.stdev(advantages) <= 1.0 + 1e-9
    pairs = zip(rewards, advantages, strict=True)
    assert [a for _, a in sorted(pairs)] == sorted(advantages)


@pytest.mark.parametrize("rewards", NO_SIGNAL.values(), ids=NO_SIGNAL)
def test_groups_without_signal(rewards: list[float]) -> None:
    """The filter drops them; without it their advantages are 0, not noise, and neighbours do not care."""
    assert not has_signal(rewards)
    for kind in (*GROUP_RELATIVE, "reinforce_pp"):
        alone = run(kind, [[1.0, 0.0]])
        assert run(kind, [rewards, [1.0, 0.0]]) == [None, *alone]
        assert run(kind, [rewards], zero_variance_filter=False) == [[0.0] * len(rewards)]
    for kind in GROUP_RELATIVE:
        zeros_and_alone = [[0.0] * len(rewards), *run(kind, [[1.0, 0.0]])]
        assert run(kind, [rewards, [1.0, 0.0]], zero_variance_filter=False) == zeros_and_alone


def test_single_members_are_a_signal_for_a_batch_baseline() -> None:
    """One trajectory a question: mean 1/2, variance 1/2 over the two groups."""
    value = 0.5 / (math.sqrt(0.5) + 1e-6)
    advantages = run("reinforce_pp", [[1.0], [0.0]], zero_variance_filter=False)
    assert [row and row[0] for row in advantages] == pytest.approx([value, -value])


def test_small_variance_is_signal() -> None:
    assert has_signal([1.0, 1.0 + 1e-6])
    assert run("grpo", [[1.0, 1.0 + 1e-6]]) != [None]


@pytest.mark.parametrize("zero_variance_filter", [True, False])
@pytest.mark.parametrize("kind", [*GROUP_RELATIVE, "reinforce_pp", "custom"])
def test_nothing_to_do(kind: str, zero_variance_filter: bool) -> None:
    def never(groups: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
        raise AssertionError("called without groups")

    assert run(kind, [], zero_variance_filter=zero_variance_filter, custom=never) == []
    assert run(kind, [[], []], zero_variance_filter=zero_variance_filter, custom=never) == [None, None]


@pytest.mark.parametrize("zero_variance_filter", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_reward_is_an_error(bad: float, zero_variance_filter: bool) -> None:
    with pytest.raises(ValueError, match=rf"finite, got \[1.0, {bad}\]"):
        has_signal([1.0, bad])
    for kind in AdvantageKind:
        with pytest.raises(ValueError, match=rf"finite, got \[1.0, {bad}\]"):
            run(kind, [[0.0, 1.0], [1.0, bad]], zero_variance_filter=zero_variance_filter)


@pytest.mark.parametrize(
    ("zero_variance_filter", "seen"),
    [(True, [[0.0, 3.0]]), (False, [[5.0], [0.0, 3.0]])],
)
def test_custom_sees_the_groups_that_stay(zero_variance_filter: bool, seen: list[list[float]]) -> None:
    calls = []

    def best_of(groups: Sequence[Sequence[float]]) -> list[list[float]]:
        calls.append([list(group) for group in groups])
        return [[float(reward == max(group)) for reward in group] for group in groups]

    advantages = run(
        "custom", [[5.0], [], [0.0, 3.0]], zero_variance_filter=zero_variance_filter, custom=best_of
    )
    assert calls == [seen]
    assert advantages == [None if zero_variance_filter else [1.0], None, [0.0, 1.0]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned None"),
        ([1.0, 2.0], r"returned \[1.0, 2.0\]"),
        ([["a", "b"]], r"returned \[\['a', 'b'\]\]"),
        ([], "returned 0 lists for 1 groups"),
        ([[1.0, 0.0], [1.0, 0.0]], "returned 2 lists for 1 groups"),
        ([[1.0]], r"for rewards \[0.0, 3.0\] it returned \[1.0\]"),
        ([[1.0, math.nan]], r"for rewards \[0.0, 3.0\] it returned \[1.0, nan\]"),
        ([[1.0, -math.inf]], r"for rewards \[0.0, 3.0\] it returned \[1.0, -inf\]"),
    ],
)
def test_custom_must_return_one_finite_number_per_reward(returned: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("custom", [[0.0, 3.0]], custom=lambda groups: returned)


def test_custom_without_a_function_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"advantage\.import_path"):
        run("custom", [[0.0, 3.0]])
