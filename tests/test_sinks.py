"""What each sink holds is read back with its own library: the names and numbers of ``metrics.jsonl``."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib.machinery import BuiltinImporter
from pathlib import Path

import pytest
import wandb

import searchrl.sinks
from searchrl.config import Config, LoggerConfig, WandbMode
from searchrl.metrics import Transcript
from searchrl.sinks import MetricLog, SinkError
from searchrl.validation.logger import logger_problems
from sink_files import event_files, steps, wandb_records, wandb_steps
from wandb_server import StandIn

CONFIG = {"seed": 3, "optimizer": {"lr": 1e-6, "betas": [0.9, 0.98]}}
BOTH = LoggerConfig(wandb=WandbMode.offline, tensorboard=True, trajectories_every=2)
ROWS = [
    Transcript(
        "Which?", "Tiber", "Tiber | Tevere", "answered", 1.0, 2, "<search>x</search>\n<answer>T</answer>"
    ),
    Transcript("Who?", "", "Nero", "tool_failed", None, 0, "hm"),
]


def wandb_file(run_dir: Path) -> Path:
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return path


def test_the_file_has_a_line_a_record_at_once(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, LoggerConfig(), {}, say=pytest.fail)
    log.write(1, {"reward/mean": 0.25})
    on_disk = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(on_disk) == {"step": 1, "reward/mean": 0.25}  # there before the log is closed
    log.show(10, ROWS)
    log.close()
    resumed = MetricLog(tmp_path, LoggerConfig(), {}, say=pytest.fail, resumed_step=1)
    resumed.write(2, {"reward/mean": 0.5, "time/step": 3.0})
    resumed.close()
    assert steps(tmp_path) == [
        {"step": 1, "reward/mean": 0.25},
        {"step": 2, "reward/mean": 0.5, "time/step": 3.0},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]
    assert log.wandb_run == ""


def test_all_sinks_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {name: f"canary-of-{name}-0123456789abcdef0123" for name in ("WANDB_API_KEY", "HF_TOKEN")}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    log = MetricLog(tmp_path, BOTH, CONFIG, say=said.append)
    for step in (1, 2, 3):
        log.write(step, {"reward/mean": step / 4, "time/step": 1.5, "tis/ratio_max": 1e8})
        log.show(step, ROWS)
    log.write(3, {"eval/exact_match": 0.125})  # of the same step
    log.close()

    recorded = steps(tmp_path)
    assert [len(record) for record in recorded] == [5, 5, 6]
    assert {record["logger/lost_records"] for record in recorded} == {0.0}
    path = wandb_file(tmp_path)
    history = wandb_steps(path)
    (table,) = path.parent.glob("files/media/table/*.json")
    shown = history[1].pop("trajectories")
    assert history == recorded
    assert said == [f"wandb: {path.parent}"]  # which `wandb sync` takes
    assert shown["nrows"] == len(ROWS)
    assert json.loads(table.read_text(encoding="utf-8")) == {
        "columns": ["question", "answer", "gold", "outcome", "reward", "searches", "transcript"],
        "data": [list(row) for row in ROWS],
    }
    config = {
        update.key: json.loads(update.value_json)
        for message in wandb_records(path)
        if message.WhichOneof("record_type") == "run"
        for update in message.run.config.update
    }
    assert config.items() >= CONFIG.items()

    scalars, accumulator = event_files(tmp_path)
    assert scalars == [pytest.approx(record, rel=1e-6) for record in recorded]  # it keeps single precision
    (text,) = accumulator.Tensors("trajectories/text_summary")
    assert text.step == 2
    assert b"    <search>x</search>\n    <answer>T</answer>" in text.tensor_proto.string_val[0]
    assert b'"betas"' in accumulator.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [name for name, value in keys.items() if value.encode() in written]


def test_a_resumed_run_is_the_same_run_and_shows_nothing_twice(tmp_path: Path) -> None:
    """Killed in step 5, resumed after step 3."""
    log = MetricLog(tmp_path, BOTH, CONFIG, say=print)
    for step in (1, 2, 3, 4, 5):
        log.write(step, {"reward/mean": step / 8})
    log.close()
    time.sleep(1)  # folders of Weights & Biases are named by the second
    resumed = MetricLog(tmp_path, BOTH, CONFIG, say=print, resumed_step=3, wandb_run=log.wandb_run)
    for step in (4, 5, 6):
        resumed.write(step, {"reward/mean": step / 8})
    resumed.close()
    expected = [{"step": step, "reward/mean": step / 8, "logger/lost_records": 0.0} for step in range(1, 7)]
    assert steps(tmp_path) == expected
    assert event_files(tmp_path)[0] == expected
    assert resumed.wandb_run == log.wandb_run
    parts = [wandb_steps(path) for path in sorted(tmp_path.glob(f"wandb/*-{log.wandb_run}/run-*.wandb"))]
    assert parts == [expected[:5], expected[3:]]


def test_a_sink_that_dies_costs_what_it_misses_and_no_more(tmp_path: Path) -> None:
    said: list[str] = []
    log = MetricLog(tmp_path, BOTH, CONFIG, say=said.append)
    log.write(1, {"reward/mean": 0.125})
    for service in service_processes():
        os.kill(service, signal.SIGKILL)
    step = 1
    while len(said) < 2:  # what it has not noticed yet it takes for sent
        step += 1
        assert step < 1000
        log.write(step, {"reward/mean": 0.25})
    for later in (step + 1, step + 2):
        log.write(later, {"reward/mean": 0.5})
        log.show(later, ROWS)
    log.close()
    assert said[1].startswith("logger: wandb failed (")
    assert said[1].endswith(") and is given up until the run is resumed; metrics.jsonl has every record")
    assert len(said) == 2
    recorded = steps(tmp_path)
    assert [record["step"] for record in recorded] == list(range(1, step + 3))
    assert [record["logger/lost_records"] for record in recorded[step - 1 :]] == [0, 1, 2]
    assert event_files(tmp_path)[0] == recorded  # the other sink does not suffer


def service_processes() -> list[int]:
    """Children of this process that are Weights & Biases' service."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if b"wandb-core" in command and parent == os.getpid():
            found.append(int(folder.name))
    assert found
    return found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its writer's thread
def test_a_full_disk_stops_tensorboard_only(tmp_path: Path) -> None:
    """Its file is put on a device that is always full."""
    said: list[str] = []
    log = MetricLog(tmp_path, LoggerConfig(tensorboard=True), CONFIG, say=said.append)
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.unlink()
    events.symlink_to("/dev/full")
    for step in range(1, 5):
        log.write(step, {"reward/mean": 0.25})
    log.close()
    for thread in threading.enumerate():
        if type(thread).__name__ == "_AsyncWriterThread":
            thread.join(timeout=10)
    assert [record["step"] for record in steps(tmp_path)] == [1, 2, 3, 4]
    assert steps(tmp_path)[-1]["logger/lost_records"] > 0
    assert "No space left on device" in said[0]
    assert len(said) == 1


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """What stands in for Weights & Biases."""
    stand_in = StandIn()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", stand_in.url)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "20")
    yield stand_in
    stand_in.close()


def test_online_steps_arrive_once_whatever_is_done_again(
    tmp_path: Path, server: StandIn, capfd: pytest.CaptureFixture[str]
) -> None:
    """Five steps; resumed after the third, up to the seventh."""
    online = LoggerConfig(wandb=WandbMode.online)
    said: list[str] = []
    log = MetricLog(tmp_path, online, CONFIG, say=said.append, resumed_step=0)
    for step in (1, 2, 3, 4, 5):
        log.write(step, {"reward/mean": step / 8})
    log.close()
    resumed = MetricLog(tmp_path, online, CONFIG, say=said.append, resumed_step=3, wandb_run=log.wandb_run)
    for step in (4, 5, 6, 7):
        resumed.write(step, {"reward/mean": step / 8})
        resumed.show(step, ROWS)  # not due
    resumed.close()
    assert said == [f"wandb: {server.url}/me/searchrl/runs/{log.wandb_run}"] * 2
    history = server.histories[log.wandb_run]
    assert [line["_step"] for line in history] == [1, 2, 3, 4, 5, 6, 7]
    assert [{name: line[name] for name in line if "/" in name} for line in history] == [
        {name: record[name] for name in record if "/" in name} for record in steps(tmp_path)
    ]
    assert server.configs[log.wandb_run].items() >= CONFIG.items()
    assert "monotonically" not in capfd.readouterr().err  # it would warn of each step that it ignores


def test_an_outage_costs_a_table_and_no_number(
    tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be sent stays on the disk, and the end waits for it only so long."""
    monkeypatch.setattr(searchrl.sinks, "FINISH_TIMEOUT_S", 1.0)
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
    said: list[str] = []
    online = LoggerConfig(wandb=WandbMode.online, trajectories_every=2)
    log = MetricLog(tmp_path, online, CONFIG, say=said.append)
    server.close()
    for step in (1, 2, 3):
        log.write(step, {"reward/mean": step / 8})
        log.show(step, ROWS)
    log.close()
    _, table, end = said
    assert table.startswith("logger: wandb did not take the trajectories of step 2 (")
    assert end.startswith("logger: wandb failed (TimeoutError: Timed out finishing run.)")
    assert [record["logger/lost_records"] for record in steps(tmp_path)] == [0, 0, 1]
    (kept,) = tmp_path.glob("wandb/run-*/run-*.wandb")  # `wandb sync --include-online` takes it
    assert wandb_steps(kept) == steps(tmp_path)


def test_a_server_out_of_reach_ends_a_run_at_its_start_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    said: list[str] = []
    online = LoggerConfig(wandb=WandbMode.online)
    with pytest.raises(SinkError, match=r"^logger\.wandb cannot be opened: CommError: .*wandb_offline$"):
        MetricLog(tmp_path, online, CONFIG, say=said.append)
    assert not (tmp_path / "metrics.jsonl").exists()  # the same command may be given again
    log = MetricLog(tmp_path, online, CONFIG, say=said.append, resumed_step=3, wandb_run="a1b2c3")
    log.write(4, {"reward/mean": 0.25})
    log.write(5, {"reward/mean": 0.25})
    log.close()
    assert log.wandb_run == "a1b2c3"  # for the next checkpoint
    assert len(said) == 1
    assert said[0].startswith("logger: wandb failed (CommError: ")
    assert [record["logger/lost_records"] for record in steps(tmp_path)] == [0, 1]


def test_a_missing_package_is_told_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(logger_problems(LoggerConfig(tensorboard=True))) == []
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    assert list(logger_problems(Config().logger)) == []
    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter])  # nothing else is installed
    assert list(logger_problems(LoggerConfig(tensorboard=True))) == [
        "logger.tensorboard=true needs the package tensorboard, which is not installed; "
        "`pip install 'searchrl[tensorboard]'` installs it"
    ]


@pytest.mark.parametrize("found", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", ".netrc", ""])
def test_where_a_key_for_weights_and_biases_may_be(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if found.startswith("."):
        (tmp_path / found).touch()
    elif found:
        (tmp_path / "file").touch()
        monkeypatch.setenv(found, str(tmp_path / "file"))
    problems = list(logger_problems(LoggerConfig(wandb=WandbMode.online)))
    assert len(problems) == (0 if found else 1)
