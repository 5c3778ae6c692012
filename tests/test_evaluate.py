"""Intervals against published and independently computed values; tables by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchrl.evaluate import (
    COMPARISON_COLUMNS,
    TABLE_COLUMNS,
    Interval,
    Result,
    by_hops,
    comparison_rows,
    eval_metrics,
    load_results,
    paired_difference,
    save_results,
    table_rows,
    wilson,
)

PLAIN = Result(
    id="0", hops=0, exact_match=False, valid_format=False, retrieval_hit=False, searches=0, error=None
)


def results(matches: str, *, hops: str | None = None, searches: int = 1) -> list[Result]:
    """One result per digit: ``"101"`` is right, wrong, right; ``hops`` likewise, a digit each."""
    return [
        replace(
            PLAIN,
            id=str(n),
            exact_match=match == "1",
            hops=int(hops[n]) if hops is not None else 0,
            searches=searches,
        )
        for n, match in enumerate(matches)
    ]


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


@given(
    st.lists(
        st.builds(
            Result,
            id=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
            hops=st.integers(0, 4),
            exact_match=st.booleans(),
            valid_format=st.booleans(),
            retrieval_hit=st.booleans(),
            searches=st.integers(0, 9),
            error=st.none() | st.text(),
        ),
        max_size=5,
    )
)
def test_results_are_read_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, some: list[Result]
) -> None:
    path = tmp_path_factory.getbasetemp() / "results" / "deep" / "after.json"
    save_results(path, some)
    assert load_results(path) == some


def test_a_results_file_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"id": "1", "matched": true}]', encoding="utf-8")
    with pytest.raises(TypeError):
        load_results(tmp_path / "x.json")
