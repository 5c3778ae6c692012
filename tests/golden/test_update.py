"""Twenty updates log the numbers that are committed beside this file, on one rank and on two.

A change of the algorithm may: ``SEARCHRL_GOLDEN=write pytest tests/golden``, and say why in the commit. A
refactoring must not move them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from integration.launch import Checks

pytestmark = pytest.mark.integration

COMMITTED = Path(__file__).with_name("update.json")
OF_RANKS, OF_MACHINES = 1e-5, 1e-4
"""Relative to the largest of a series. Measured between one and two ranks: 5e-7; the second is wider for
other processors' order of summation, which 40 optimizer steps of AdamW magnify."""

Series = dict[str, list[float]]


@pytest.fixture(scope="module")
def logged(update_checks: dict[int, tuple[Path, Checks]]) -> dict[int, Series]:
    """What each step logged, by number of ranks."""
    found: dict[int, Series] = {n: checks.results["golden"] for n, (_, checks) in update_checks.items()}
    if os.environ.get("SEARCHRL_GOLDEN") == "write":
        rounded = {name: [float(f"{value:.7g}") for value in values] for name, values in found[1].items()}
        COMMITTED.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
    return found


def assert_close(found: Series, expected: Series, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert len(values) == 20
        scale = max(abs(value) for value in values)
        assert found[name] == pytest.approx(values, rel=0, abs=tolerance * scale), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_numbers_are_the_committed_ones(logged: dict[int, Series], ranks: int) -> None:
    assert_close(logged[ranks], json.loads(COMMITTED.read_text(encoding="utf-8")), OF_MACHINES)


def test_two_ranks_log_what_one_does(logged: dict[int, Series]) -> None:
    assert_close(logged[2], logged[1], OF_RANKS)


def test_the_run_learns_something() -> None:
    """Otherwise its numbers would hold for many wrong algorithms."""
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert committed["loss/ref_kl"][-1] > 10 * committed["loss/ref_kl"][0] > 0
