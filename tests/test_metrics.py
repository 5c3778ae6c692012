"""Means that add up, clocks that add up, and a log that can be read back."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchrl.config import LoggerConfig, WandbMode
from searchrl.metrics import MetricLog, Tally


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


def test_the_log_is_appended_to_a_line_per_step(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, LoggerConfig(), {})
    log.write(1, {"reward/mean": 0.25})
    on_disk = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(on_disk) == {"step": 1, "reward/mean": 0.25}  # there before the log is closed
    log.close()
    resumed = MetricLog(tmp_path, LoggerConfig(), {})
    resumed.write(2, {"reward/mean": 0.5, "time/step": 3.0})
    resumed.close()
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert json.loads(lines[1]) == {"step": 2, "reward/mean": 0.5, "time/step": 3.0}


def test_weights_and_biases_works_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {name: f"canary-of-{name}-0123456789abcdef0123" for name in ("WANDB_API_KEY", "HF_TOKEN")}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    log = MetricLog(tmp_path, LoggerConfig(wandb=WandbMode.offline), {"seed": 3})
    log.write(1, {"reward/mean": 0.25})
    log.write(2, {"reward/mean": 0.5})
    log.close()
    assert log.wandb_run
    (recorded,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    wanted = (b"searchrl", b"reward/mean", b"0.25", b"0.5", b"seed")
    deadline = time.monotonic() + 30
    # Its service process writes the file, and may do so a moment after the run has ended.
    while missing := [part for part in wanted if part not in recorded.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [name for name, value in keys.items() if value.encode() in written]


def test_a_resumed_run_is_the_same_run_to_weights_and_biases(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, LoggerConfig(wandb=WandbMode.offline), {}, wandb_run="a1b2c3")
    log.close()
    assert log.wandb_run == "a1b2c3"
    assert [path.suffix for path in tmp_path.glob("wandb/offline-run-*-a1b2c3/run-a1b2c3.wandb")] == [
        ".wandb"
    ]
    plain = MetricLog(tmp_path, LoggerConfig(), {})
    plain.close()
    assert plain.wandb_run == ""
