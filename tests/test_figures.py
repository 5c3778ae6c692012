"""The line of a step: numbers of every magnitude stay in their columns."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchrl.figures import StepLines, duration, number

WHOLE = {
    "time/step": 42.0,
    "reward/mean": 0.281,
    "reward/exact_match": 0.25,
    "search_r1/search_calls_per_sample": 1.02,
    "rollout/sampled_tokens": 34.4,
    "rollout/informative_groups": 0.375,
    "rollout/void": 0.0,
    "update/grad_norm": 1.448,
    "tis/ess_ratio": 0.99999,
    "sync/probe_max_abs_diff": 3.6e-5,
    "time/rollout": 30.2,
    "time/update": 7.04,
}
LINES = StepLines(steps=1000, width=140)


def columns(line: str) -> dict[str, str]:
    """The cell under each name of the header: a cell ends where its name does."""
    found, start = {}, 0
    for name in re.finditer(r"\S+", LINES.header()):
        end = len("step 1000/1000") if name[0] == "step" else name.end()
        found[name[0]] = line[start:end].strip()
        start = end
    assert line[start:] == ""
    return found


def test_a_line_names_nothing_and_lines_up_with_its_header() -> None:
    line = LINES.row(7, WHOLE, 3723.0)
    assert columns(line) == {
        "step": "step 7/1000",
        "time": "42s",
        "left": "1h02m",
        "reward": "0.281",
        "EM": "0.250",
        "searches": "1.02",
        "tokens": "34",
        "signal": "38%",
        "void": "0.0%",
        "grad": "1.45",
        "ESS": "1.000",
        "probe": "3.6e-05",
        "rollout": "30s",
        "update": "7.0s",
    }
    assert 100 <= len(LINES.header()) <= 140


@pytest.mark.parametrize("missing", sorted(WHOLE))
def test_what_a_step_lacks_leaves_its_place_blank(missing: str) -> None:
    whole = columns(LINES.row(7, WHOLE, 1.0))
    without = columns(LINES.row(7, {name: WHOLE[name] for name in WHOLE if name != missing}, 1.0))
    (blank,) = [name for name in whole if whole[name] != without[name]]
    assert without[blank] == ""


SHARE = st.floats(0, 1)
SECONDS = st.floats(0, 1e8)
ANY = st.floats(width=64)
METRICS = st.fixed_dictionaries(
    {},
    optional={
        "time/step": SECONDS,
        "reward/mean": ANY,
        "reward/exact_match": SHARE,
        "search_r1/search_calls_per_sample": st.floats(0, 1e4),
        "rollout/sampled_tokens": st.floats(0, 1e12),
        "rollout/informative_groups": SHARE,
        "rollout/void": SHARE,
        "update/grad_norm": ANY,
        "tis/ess_ratio": SHARE,
        "sync/probe_max_abs_diff": ANY,
        "time/rollout": SECONDS,
        "time/update": SECONDS,
    },
)


@settings(max_examples=60, deadline=None)
@given(step=st.integers(1, 1000), metrics=METRICS, left=SECONDS)
def test_whatever_the_numbers_every_cell_ends_under_its_name(
    step: int, metrics: dict[str, float], left: float
) -> None:
    cells = columns(LINES.row(step, metrics, left))
    assert all(" " not in cell for name, cell in cells.items() if name != "step")
    assert cells["step"] == f"step {step}/1000"
    assert sum(cell != "" for cell in cells.values()) == len(metrics) + 2  # step and left


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_narrow_terminal_shows_what_fits_the_most_important_first(width: int) -> None:
    lines = StepLines(steps=1000, width=width)
    for line, whole in (
        (lines.header(), LINES.header()),
        (lines.row(7, WHOLE, 1.0), LINES.row(7, WHOLE, 1.0)),
    ):
        assert len(line) <= width
        assert whole.startswith(line)
    assert "reward" in lines.header()


@given(value=st.floats(-1e308, 1e308), digits=st.integers(0, 3))
def test_a_number_fits_and_is_near_the_truth(value: float, digits: int) -> None:
    text = number(value, 7, digits)
    assert len(text) <= 7
    assert math.isclose(float(text), value, rel_tol=0.5, abs_tol=0.5 * 10.0**-digits)
    assert (float(text) == 0) == (value == 0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (1.448, "1.45"),
        (-1.448, "-1.45"),
        (0.004, "4.0e-03"),
        (0.005001, "0.01"),
        (12345.678, "12345.7"),
        (1234567.0, "1234567"),
        (12345678.0, "1.2e+07"),
        (-12345678.0, "-1e+07"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value, 7, 2) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (192.0, "3m12s"),
        (3599.6, "1h00m"),
        (3900.0, "1h05m"),
        (172_799.0, "2d00h"),
        (183_600.0, "2d03h"),
        (1e7, "115d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
