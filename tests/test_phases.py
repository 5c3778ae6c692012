"""Seconds, memory peaks and the event log of phases; the host's memory is the real one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from searchrl.phases import Phases


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_seconds_add_up_by_phase_until_they_are_taken() -> None:
    phases = Phases(None, device="cpu")
    with phases("swap"):
        time.sleep(0.02)
    with phases("update"):
        time.sleep(0.01)
    with phases("swap"):
        time.sleep(0.02)
    metrics = phases.metrics()
    assert {name for name in metrics if name.startswith("time/")} == {"time/swap", "time/update", "time/step"}
    assert metrics["time/swap"] >= 0.04
    assert metrics["time/update"] >= 0.01
    assert metrics["time/step"] == pytest.approx(metrics["time/swap"] + metrics["time/update"])
    assert phases.metrics().keys() == {"time/step", "memory/baseline_gib"}


def test_a_phase_has_the_peak_of_its_own_block() -> None:
    """256 MB that were allocated and freed again inside, whatever was there before or after."""
    phases = Phases(None, device="cpu")
    with phases("before"):
        pass
    with phases("much"):
        torch.ones(2**26)
    with phases("little"):
        torch.ones(2**10)
    metrics = phases.metrics()
    before, much, little = (metrics[f"memory/{name}_peak_gib"] for name in ("before", "much", "little"))
    assert 0.01 < metrics["memory/baseline_gib"] <= before + 0.01
    assert much - before == pytest.approx(0.25, abs=0.03)
    assert much - little == pytest.approx(0.25, abs=0.03)


def test_a_phase_that_comes_twice_has_the_higher_peak() -> None:
    phases = Phases(None, device="cpu")
    with phases("swap"):
        torch.ones(2**26)
    with phases("swap"):
        pass
    with phases("after"):
        pass
    metrics = phases.metrics()
    assert metrics["memory/swap_peak_gib"] - metrics["memory/after_peak_gib"] > 0.2


def test_events_are_written_as_they_happen(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    phases, start = Phases(path, device="cpu"), time.time()
    phases.step = 3
    with phases("sync"):
        phases.event("engine_wake", part="weights", noop=True)
        assert [line["event"] for line in lines(path)] == ["phase_start", "engine_wake"]
    opened, woken, closed = lines(path)
    assert (opened["phase"], closed["event"], closed["phase"]) == ("sync", "phase_end", "sync")
    assert woken.items() >= {"step": 3, "event": "engine_wake", "part": "weights", "noop": True}.items()
    assert start - 1 < opened["time"] <= woken["time"] <= closed["time"] < time.time() + 1
    assert closed["seconds"] > 0
    assert closed["peak_gib"] > 0.01
    phases.close()
    again = Phases(path, device="cpu")
    again.event("run_start")
    again.close()
    assert len(lines(path)) == 4, "a resumed run goes on"


def test_a_block_that_fails_counts_and_lets_the_error_through(tmp_path: Path) -> None:
    phases = Phases(tmp_path / "events.jsonl", device="cpu")

    def fail() -> None:
        with phases("sync"):
            time.sleep(0.01)
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    phases.close()
    assert phases.metrics()["time/sync"] >= 0.01
    assert lines(tmp_path / "events.jsonl")[-1]["event"] == "phase_end"
