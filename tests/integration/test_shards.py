"""Checkpoints of real actors give the next step back bit by bit, at every ZeRO stage, on one rank and two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from integration.launch import Checks
from integration.scripts.shard_checks import ELSEWHERE, FROM_ONE_RANK

pytestmark = pytest.mark.integration

CASES = ("zero0", "zero1", "zero2", "zero3", "zero3/fp32")
RANKS = (1, 2)


@pytest.fixture(params=[(case, ranks) for case in CASES for ranks in RANKS], ids=lambda param: f"{param}")
def measured(request: pytest.FixtureRequest, update_checks: dict[int, tuple[Path, Checks]]) -> dict[str, Any]:
    case, ranks = request.param
    result: dict[str, Any] = update_checks[ranks][1].results["shards"][case]
    return result | {"case": case, "ranks": ranks}


def test_the_next_step_is_the_same_bit_by_bit(measured: dict[str, Any]) -> None:
    assert measured["an update matters"]
    assert measured["loaded"]
    assert measured["continued"]


def test_so_is_the_first_step_where_adamw_has_no_states_yet(measured: dict[str, Any]) -> None:
    assert measured["from the beginning"]


def test_another_stage_reads_the_same_bits(measured: dict[str, Any]) -> None:
    if measured["case"] in ELSEWHERE:
        assert measured["loaded elsewhere"]
        # In bf16 a sum that is rounded otherwise moves a weight by at most a few units in the last place.
        assert measured["error elsewhere"] <= (1e-2 if measured["case"] in ("zero1", "zero3") else 1e-6)


def test_two_ranks_read_the_bits_that_one_saved(measured: dict[str, Any]) -> None:
    if measured["case"] in FROM_ONE_RANK and measured["ranks"] == 2:
        assert measured["from one rank"]
