"""A run that hangs is noticed, named and ended; a request to stop reaches ranks that got no signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from integration.launch import environment
from searchrl.heartbeat import stalled
from searchrl.phases import Phases, Sign


@pytest.mark.parametrize(
    ("signs", "behind"),
    [
        ([Sign(12, "update", 35, 900), Sign(12, "rollout", 33, 700)], "the others wait for rank 1"),
        (
            [Sign(3, "sync", 9, 1), Sign(3, "update", 8, 1), Sign(3, "update", 8, 5)],
            "the others wait for rank 1, 2",
        ),
        ([Sign(3, "update", 8, 1), Sign(3, "update", 8, 5)], None),
        ([Sign(0, "start", 0, 0)], None),
    ],
)
def test_who_is_behind(signs: list[Sign], behind: str | None) -> None:
    first, *lines = stalled(signs, [60.4] * len(signs), 60.0).splitlines()
    assert first == "no rank has given a sign of life for stall_timeout_s=60 s; what each did last:"
    expected = [f"  rank {n}: {sign.doing}, step {sign.step}, for 60 s" for n, sign in enumerate(signs)]
    assert lines == expected + ([behind] if behind else [])


def test_phases_give_signs_of_life() -> None:
    phases = Phases(None, device="cpu")
    seen = [phases.sign]
    phases.step = 7
    with phases("rollout"):
        seen.append(phases.sign)
        phases.alive(lambda _: None)(object())
        seen.append(phases.sign)
    seen.append(phases.sign)
    phases.beat("saving")
    seen.append(phases.sign)
    assert [sign.doing for sign in seen] == ["start", "rollout", "rollout", "after rollout", "saving"]
    assert [sign.step for sign in seen] == [0, 7, 7, 7, 7]
    assert [sign.begun for sign in seen] == [0, 1, 1, 1, 1]
    numbers = [sign.number for sign in seen]
    assert numbers == sorted(set(numbers))


PARENT = "import sys; from searchrl.launcher import launch; launch(['-c', *sys.argv[1:]], 2)"
RANK = """
import os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
from searchrl.distributed import barrier, init_world
from searchrl.heartbeat import Heartbeat
from searchrl.phases import Phases
from searchrl.preemption import StopRequest
world, out = init_world("cpu"), Path(sys.argv[1])
if world.size > 1:
    dist.init_process_group("gloo")
phases, stop = Phases(None, device="cpu"), StopRequest()
phases.step = 3
beating = Heartbeat(phases, stop, world=world, timeout_s=float(sys.argv[2]), run_dir=out)
"""
HANGS = """
def a_library_that_never_returns():
    time.sleep(600)
with beating:
    with phases("rollout"):
        if world.rank == world.size - 1:
            a_library_that_never_returns()
    with phases("update"):
        barrier()
"""
WORKS = """
with beating, stop:
    for _ in range(30):  # each shorter than the timeout, all together longer
        with phases("rollout"):
            time.sleep(0.1)
"""
TOLD = """
with beating, stop:
    (out / f"{world.rank} is {os.getpid()}").touch()
    while stop.asked is None:
        phases.beat()
        time.sleep(0.02)
    barrier()
    print(f"rank {world.rank} heard of {stop.asked.name}", flush=True)
"""


def start(body: str, out: Path, *, ranks: int, timeout_s: float) -> subprocess.Popen[str]:
    code = ["-c", PARENT] if ranks == 2 else ["-c"]
    return subprocess.Popen(
        [sys.executable, *code, RANK + body, str(out), str(timeout_s)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.integration
def test_a_hanging_rank_is_named_and_all_are_ended(tmp_path: Path) -> None:
    printed, _ = start(HANGS, tmp_path, ranks=2, timeout_s=2.0).communicate(timeout=120)
    lines = printed.splitlines()
    assert (
        lines[0] == "searchrl: no rank has given a sign of life for stall_timeout_s=2 s; what each did last:"
    )
    assert re.fullmatch(r"  rank 0: update, step 3, for [2-9] s", lines[1])
    assert re.fullmatch(r"  rank 1: rollout, step 3, for [2-9] s", lines[2])
    assert lines[3] == "the others wait for rank 1"
    assert lines[-1] == f"where each rank's threads stand: {tmp_path}/stalled.rank*.txt"
    stacks = (tmp_path / "stalled.rank1.txt").read_text(encoding="utf-8")
    assert "a_library_that_never_returns" in stacks
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.integration
def test_who_moves_is_left_alone(tmp_path: Path) -> None:
    process = start(WORKS, tmp_path, ranks=1, timeout_s=1.0)
    printed, _ = process.communicate(timeout=60)
    assert (process.returncode, printed, list(tmp_path.iterdir())) == (0, "", [])


@pytest.mark.integration
def test_a_signal_to_one_rank_reaches_the_other(tmp_path: Path) -> None:
    process = start(TOLD, tmp_path, ranks=2, timeout_s=60.0)
    deadline = time.monotonic() + 60
    while len(found := [path.name.split(" is ") for path in tmp_path.iterdir()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int(dict(found)["1"]), signal.SIGUSR1)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert [printed.count(f"rank {number} heard of SIGUSR1") for number in (0, 1)] == [1, 1]  # lines may mix
