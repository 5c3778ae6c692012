"""On a GPU memory really changes hands, and the probe passes after every turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from integration.launch import Checks, run_checks

pytestmark = pytest.mark.gpu

GIB = 2**30


@pytest.fixture(scope="module")
def checks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    return run_checks(
        "colocation_checks", tmp_path_factory.mktemp("colocation"), tiny_model, timeout_s=900, device="cuda"
    )


@pytest.fixture(params=["zero2", "zero3"])
def turns(request: pytest.FixtureRequest, checks: Checks) -> dict[str, Any]:
    measured: dict[str, Any] = checks.results[request.param]
    return measured


def test_a_sleeping_engine_gives_up_weights_and_cache(checks: Checks) -> None:
    weights = 2 * checks.results["elements"] / GIB
    assert checks.results["slept"] >= 0.95 * (weights + checks.results["kv_gib"])


def test_the_trainer_gives_up_its_optimizer_and_gets_it_back(checks: Checks, turns: dict[str, Any]) -> None:
    states = 12 * checks.results["elements"] / GIB  # moments and master weights, on one rank
    memory = turns["memory"]
    # Before the first update there are no moments yet.
    assert memory["trainer"][1] - memory["nobody"][1] >= 0.95 * states


def test_the_engine_gets_its_memory_back_and_gives_it_up_again(checks: Checks, turns: dict[str, Any]) -> None:
    engine = 2 * checks.results["elements"] / GIB + checks.results["kv_gib"]
    memory = turns["memory"]
    for awake, asleep in zip(memory["engine"], memory["nobody again"], strict=True):
        assert awake - asleep >= 0.95 * engine
    assert memory["nobody again"][1] == pytest.approx(memory["nobody again"][0], abs=0.25), (
        "nothing is left behind"
    )


def test_the_probe_and_the_checksum_pass_after_every_turn(turns: dict[str, Any]) -> None:
    assert len(turns["probes"]) == 2
    assert max(turns["probes"]) <= 0.1


def test_peaks_leave_out_who_sleeps(checks: Checks, turns: dict[str, Any]) -> None:
    """An update's peak has the optimizer and not the engine; a sync's the engine and not the optimizer."""
    elements = checks.results["elements"]
    measured, memory = turns["phases"], turns["memory"]
    assert measured["memory/update_peak_gib"] >= 0.95 * max(memory["trainer"])
    assert measured["memory/sync_peak_gib"] >= 0.95 * max(memory["engine"])
    everything = max(memory["trainer"]) + 2 * elements / GIB + checks.results["kv_gib"]
    assert measured["memory/sync_peak_gib"] < everything
