"""Means that add up, and records that are read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchrl.metrics import Tally, read_records


def test_a_tally_is_a_mean_by_name() -> None:
    tally = Tally()
    for value in (1.0, 0.0, 0.5):
        tally.add("a", value)
    tally.add("b", 7.0)
    assert tally.reduce() == {"a": 0.5, "b": 7.0}
    assert tally.reduce() == {"a": 0.5, "b": 7.0}  # reading it changes nothing


def test_weights_make_ratios_of_sums() -> None:
    """3 of 10 tokens and 1 of 2 are 4 of 12, not the mean of 0.3 and 0.5."""
    tally = Tally()
    tally.add("fraction", 3, 10)
    tally.add("fraction", 1, 2)
    assert tally.reduce()["fraction"] == pytest.approx(4 / 12)


def test_a_name_without_weight_is_left_out() -> None:
    tally = Tally()
    tally.add("nothing", 0.0, 0.0)
    tally.add("something", 0.0)
    assert tally.reduce() == {"something": 0.0}
    assert Tally().reduce() == {}


@given(st.lists(st.tuples(st.floats(-100, 100), st.floats(0.125, 10)), min_size=1, max_size=20))
def test_a_tally_is_the_weighted_mean(observations: list[tuple[float, float]]) -> None:
    tally = Tally()
    for mean, weight in observations:
        tally.add("x", mean * weight, weight)
    expected = sum(mean * weight for mean, weight in observations) / sum(w for _, w in observations)
    assert tally.reduce()["x"] == pytest.approx(expected, abs=1e-9)


def test_tallies_share_nothing() -> None:
    first, second = Tally(), Tally()
    first.add("x", 1.0)
    assert second.reduce() == {}


def test_records_are_read_up_to_a_step_and_a_line_cut_short_is_none(tmp_path: Path) -> None:
    assert read_records(tmp_path, 9) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 0.5}\n{"step": 2}\n{"step": 3}\n{"st')
    assert read_records(tmp_path, 2) == [{"step": 1, "a": 0.5}, {"step": 2}]
    assert len(read_records(tmp_path, 9)) == 3
