"""Ranks of one machine start together, say once what is wrong, and end together whatever ends one of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from integration.launch import environment, gone
from searchrl.config import Config, ConfigError, Device
from searchrl.launcher import count_visible, require_devices, world_size

PARENT = "import sys; from searchrl.launcher import launch; launch(['-c', sys.argv[1]], 2)"
RANK = """
import os, sys, time
from searchrl.launcher import join_launcher, tell_launcher
join_launcher()
rank = int(os.environ["RANK"])
os.write(1, f"rank {rank} of {os.environ['WORLD_SIZE']} is {os.getpid()}\\n".encode())  # in one piece
"""
"""What `cli.run` does in a rank, without what makes it heavy."""


@contextmanager
def launched(body: str) -> Iterator[subprocess.Popen[str]]:
    """Two ranks that run ``body``, under a launcher of their own."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, RANK + body],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def pids(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids by rank, once both ranks run."""
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    found = [re.fullmatch(r"rank (\d) of 2 is (\d+)\n", line) for line in lines]
    assert None not in found, lines
    return {int(match[1]): int(match[2]) for match in found if match is not None}


@pytest.mark.integration
def test_the_first_error_is_printed_once_and_its_exit_code_stays() -> None:
    """Not the first rank's, nor that of the rank which is the first to end, nor what it led to elsewhere."""
    body = """
mine = os.environ["TORCHELASTIC_ERROR_FILE"]
while rank == 0 and not os.path.exists(mine.replace("0/error.json", "1/error.json")):
    time.sleep(0.01)
tell_launcher(f"rank {rank} fails", 1 + rank)
time.sleep(600 * rank)
sys.exit(1)
"""
    with launched(body) as process:
        pids(process)
        rest, _ = process.communicate(timeout=120)
    assert (process.returncode, rest) == (2, "rank 1 fails\n")


@pytest.mark.integration
def test_a_killed_rank_ends_the_others_and_is_the_cause_of_their_errors() -> None:
    # Rank 0 complains of the lost connection before the launcher has noticed why it was lost.
    body = """
siblings = f"/proc/{os.getppid()}/task/{os.getppid()}/children"
while rank == 0:
    for pid in set(open(siblings).read().split()) - {str(os.getpid())}:
        if open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z":
            tell_launcher("the connection was closed", 1)
            sys.exit(1)
time.sleep(600)
"""
    with launched(body) as process:
        ranks = pids(process)
        os.kill(ranks[1], signal.SIGKILL)
        start = time.monotonic()
        rest, _ = process.communicate(timeout=120)
    assert time.monotonic() - start < 20
    assert process.returncode == 1
    assert rest == "searchrl: rank 1 was killed by SIGKILL; the other ranks were ended\n"
    assert gone(ranks[0], 1)


@pytest.mark.integration
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_launcher_ends_its_ranks(sent: signal.Signals) -> None:
    with launched("time.sleep(600)") as process:
        ranks = pids(process)
        process.send_signal(sent)
        process.wait(timeout=120)
        assert [gone(pid, 10) for pid in ranks.values()] == [True, True]
    assert process.returncode == (-sent if sent is signal.SIGKILL else 128 + sent)


SAVES = """
import signal
asked = []
for sent in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(sent, lambda number, _: asked.append(number))
os.write(1, f"rank {rank} is ready\\n".encode())
while not asked:
    time.sleep(0.01)
time.sleep(0.1 + rank)
os.write(1, f"rank {rank} has saved\\n".encode())
tell_launcher(f"stopped by {asked[0]}", 75)
sys.exit(75)
"""


def ready(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of both ranks, once they listen."""
    assert process.stdout is not None
    printed = "".join(process.stdout.readline() for _ in range(4))
    assert printed.count("is ready") == 2, printed
    return [int(pid) for pid in re.findall(r"is (\d+)\n", printed)]


@pytest.mark.integration
@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGINT])
def test_ranks_have_time_to_save_and_the_last_word(sent: signal.Signals) -> None:
    with launched(SAVES) as process:
        ranks = ready(process)
        process.send_signal(sent)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)  # again, as clusters do: changes nothing
        rest, _ = process.communicate(timeout=120)
        assert all(gone(pid, 1) for pid in ranks)
    assert process.returncode == 75
    first, *saved, last = rest.splitlines()
    assert first == f"searchrl: {sent.name}: stopping; from now on Ctrl-C leaves at once"
    assert sorted(saved) == ["rank 0 has saved", "rank 1 has saved"]
    assert last == f"stopped by {int(sent)}"


@pytest.mark.integration
def test_a_second_ctrl_c_does_not_wait() -> None:
    with launched(SAVES.replace("0.1 + rank", "600")) as process:
        ranks = ready(process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=20)
        assert all(gone(pid, 10) for pid in ranks)
    assert (process.returncode, rest) == (
        130,
        "searchrl: SIGINT: stopping; from now on Ctrl-C leaves at once\n",
    )


@pytest.mark.parametrize(
    ("installed", "listed", "count"),
    [
        (8, None, 8),
        (8, "", 0),
        (8, "-1", 0),
        (8, "0", 1),
        (8, "6, 7", 2),
        (8, "0,8,1", 1),
        (8, "GPU-8932f937,GPU-15d2a4c1", 2),
        (8, "MIG-4a1b,MIG-77c3", 1),
        (0, None, 0),
    ],
)
def test_gpus_within_cuda_visible_devices(installed: int, listed: str | None, count: int) -> None:
    assert count_visible(installed, listed) == count


def test_ranks_are_those_of_the_launcher_else_those_it_would_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world_size(Config(device=Device.cpu)) == 1
    assert world_size(Config(device=Device.cuda, processes=8)) == 8  # a plan for another machine
    require_devices(Config(device=Device.cpu, processes=2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert world_size(Config(device=Device.cuda)) == 1
    with pytest.raises(
        ConfigError, match=r"1 in all, but the .* shows 0 within CUDA_VISIBLE_DEVICES=; choose"
    ):
        require_devices(Config(device=Device.cuda))
    for name, value in (("RANK", "9"), ("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert world_size(Config(device=Device.cpu)) == 16
    require_devices(Config(device=Device.cpu))
    with pytest.raises(ConfigError, match="processes=2, but the launcher has started 8 on this machine"):
        require_devices(Config(device=Device.cpu, processes=2))
