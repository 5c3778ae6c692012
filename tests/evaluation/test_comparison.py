"""Before and after: paired differences against numpy, tables by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import PLAIN_RESULT
from searchrl.evaluation.comparison import (
    COMPARISON_COLUMNS,
    SIDE_BY_SIDE,
    TABLE_COLUMNS,
    by_hops,
    comparison_rows,
    eval_metrics,
    paired_difference,
    side_by_side,
    table_rows,
)
from searchrl.evaluation.intervals import Interval, wilson
from searchrl.evaluation.results import Result


def results(matches: str, *, hops: str | None = None, searches: int = 1) -> list[Result]:
    """One result per digit: ``"101"`` is right, wrong, right; ``hops`` likewise, a digit each."""
    return [
        replace(
            PLAIN_RESULT,
            id=str(n),
            exact_match=match == "1",
            hops=int(hops[n]) if hops is not None else 0,
            searches=searches,
        )
        for n, match in enumerate(matches)
    ]


def test_a_paired_difference_by_hand() -> None:
    """Differences 1, 0, 0, 1, -1: mean 0.2, variance 2.8 / 4 = 0.7, half width 1.96 sqrt(0.7 / 5)."""
    interval = paired_difference(results("00101"), results("10110"))
    half = 1.96 * math.sqrt(0.7 / 5)
    assert interval.value == pytest.approx(0.2)
    assert [interval.low, interval.high] == pytest.approx([0.2 - half, 0.2 + half])
    assert str(interval) == f"0.200 [{0.2 - half:.3f}, {0.2 + half:.3f}]" == "0.200 [-0.533, 0.933]"


@given(st.lists(st.tuples(st.sampled_from("01"), st.sampled_from("01")), min_size=2, max_size=60))
def test_a_paired_difference_against_numpy(pairs: list[tuple[str, str]]) -> None:
    before, after = ("".join(part) for part in zip(*pairs, strict=True))
    differences = np.array([int(b) - int(a) for a, b in pairs], dtype=np.float64)
    error = differences.std(ddof=1) / np.sqrt(len(pairs))
    interval = paired_difference(results(before), results(after))
    assert interval.value == pytest.approx(differences.mean(), abs=1e-12)
    assert interval.high - interval.value == pytest.approx(1.96 * error, abs=1e-12)
    assert interval.value - interval.low == pytest.approx(1.96 * error, abs=1e-12)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (results("01"), results("011")),
        (results("01"), list(reversed(results("01")))),
        (results("01"), [replace(result, id=result.id + "x") for result in results("01")]),
        (results("0"), results("1")),
        ([], []),
    ],
)
def test_other_questions_cannot_be_compared(before: list[Result], after: list[Result]) -> None:
    message = r"^a paired difference needs the same questions, at least two, in the same order$"
    with pytest.raises(ValueError, match=message):
        paired_difference(before, after)


def test_results_by_hops() -> None:
    parts = by_hops(results("0101", hops="2112"))
    assert {name: [result.id for result in part] for name, part in parts.items()} == {
        "all": ["0", "1", "2", "3"],
        "1 hop": ["1", "2"],
        "2 hop": ["0", "3"],
    }
    assert list(by_hops(results("01", hops="02"))) == ["all", "2 hop"]
    assert list(by_hops(results("01"))) == ["all"]


def test_the_table_of_one_evaluation() -> None:
    some = results("0101", hops="2112", searches=2)
    some[1] = replace(some[1], retrieval_hit=True, valid_format=True, searches=1)
    rows = table_rows(some)
    assert [len(row) for row in rows] == [len(TABLE_COLUMNS)] * 3
    assert rows[0] == ["all", "4", str(wilson(2, 4)), "1.75", "0.250", "0.250", "0"]
    assert rows[1] == ["1 hop", "2", str(wilson(1, 2)), "1.50", "0.500", "0.500", "0"]
    assert rows[2] == ["2 hop", "2", str(wilson(1, 2)), "2.00", "0.000", "0.000", "0"]


def test_the_table_of_a_comparison() -> None:
    before = results("00101", hops="11222", searches=1)
    after = results("10110", hops="11222", searches=2)
    after[0] = replace(after[0], retrieval_hit=True)
    after[2] = replace(after[2], retrieval_hit=True)
    rows = comparison_rows(before, after)
    assert len(set(COMPARISON_COLUMNS)) == len(COMPARISON_COLUMNS) == len(rows[0])
    assert rows[0] == [
        "all",
        "5",
        "0.400",
        "0.600",
        "0.200 [-0.533, 0.933]",
        "0.000",
        "0.400",
        "1.00",
        "2.00",
    ]
    (shown, *_) = side_by_side(before, after)
    assert shown == ["all", "5", "0.400→0.600", "0.200 [-0.533, 0.933]", "0.00→0.40", "1.00→2.00"]
    assert len(shown) == len(SIDE_BY_SIDE)
    assert rows[1][:4] == ["1 hop", "2", "0.000", "0.500"]
    assert rows[2][:4] == ["2 hop", "3", "0.667", "0.667"]
    assert rows[2][4] == str(Interval(value=0.0, low=-1.96 * math.sqrt(1 / 3), high=1.96 * math.sqrt(1 / 3)))


def test_one_question_is_compared_without_an_interval() -> None:
    rows = comparison_rows(results("000", hops="112"), results("111", hops="112"))
    assert rows[2] == ["2 hop", "1", "0.000", "1.000", "n/a", "0.000", "0.000", "1.00", "1.00"]


def test_a_comparison_of_other_questions_is_refused() -> None:
    with pytest.raises(ValueError, match="the same questions"):
        comparison_rows(results("0101"), results("010"))


def test_eval_metrics() -> None:
    some = results("0111", hops="2112", searches=2)
    some[0] = replace(some[0], error="no connection")
    some[3] = replace(some[3], retrieval_hit=True)
    assert eval_metrics(some) == {
        "eval/void": 1.0,
        "eval/exact_match": 0.75,
        "eval/gold_shown": 0.25,
        "eval/searches": 2.0,
        "eval/exact_match_1_hop": 1.0,
        "eval/gold_shown_1_hop": 0.0,
        "eval/searches_1_hop": 2.0,
        "eval/exact_match_2_hop": 0.5,
        "eval/gold_shown_2_hop": 0.5,
        "eval/searches_2_hop": 2.0,
    }
