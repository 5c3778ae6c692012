"""Starts the real thing in processes of its own: check scripts and the command line.

An engine needs a fresh process: it must come before whatever the unit tests have imported, and its process
group can exist only once.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchrl.environment import default_settings

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src"


@dataclass(kw_only=True, slots=True, frozen=True)
class Checks:
    """What a check script measured, and what it printed."""

    results: dict[str, Any]
    printed: str
    ended: float
    """``time.time()`` at the end."""


def python(module: str, arguments: Sequence[object], *, ranks: int = 1) -> list[str]:
    """The command that runs ``module`` on so many ranks."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [*launcher, module, *map(str, arguments)]


def environment(device: str = "cpu") -> dict[str, str]:
    """The environment of a child: our sources, one thread, nothing of a surrounding torchrun.

    What this process has set for itself, the child has to set itself.
    """
    own = ("RANK", "WORLD_SIZE", "WANDB_SERVICE", *default_settings(device))
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    paths = {"PYTHONPATH": f"{SOURCE}{os.pathsep}{TESTS}", "CHECKS_DEVICE": device}
    return {**inherited, **paths, "OMP_NUM_THREADS": "1"}


def run_checks(
    script: str,
    out: Path,
    *arguments: object,
    ranks: int = 1,
    timeout_s: float = 300,
    fails: bool = False,
    device: str = "cpu",
) -> Checks:
    """Run ``scripts/<script>.py OUT ARGUMENTS…``, which writes its results to ``OUT/results.json``.

    It must succeed or, if its last check is how a failure ends, fail.
    """
    command = python(f"integration.scripts.{script}", [out, *arguments], ranks=ranks)
    finished = run(command, cwd=out, timeout_s=timeout_s, device=device)
    ended = time.time()
    assert (finished.returncode != 0) == fails, finished.stdout
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return Checks(results=results, printed=finished.stdout, ended=ended)


def run(
    command: Sequence[str], *, cwd: Path, timeout_s: float, device: str = "cpu"
) -> subprocess.CompletedProcess[str]:
    """Run to the end; output and errors together in ``stdout``. ``device`` is where check scripts run."""
    with started(command, cwd=cwd, timeout_s=timeout_s, device=device) as process:
        output, _ = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output)


@contextmanager
def started(
    command: Sequence[str], *, cwd: Path, timeout_s: float, device: str = "cpu"
) -> Iterator[subprocess.Popen[str]]:
    """A running command, killed with its process group after ``timeout_s`` or at the end of the block."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(device),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        alarm = threading.Timer(timeout_s, os.killpg, (process.pid, signal.SIGKILL))
        alarm.start()
        try:
            yield process
        finally:
            alarm.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the process printed up to the line that contains ``text``; fails if it ends before."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if text in line:
            return printed
    raise AssertionError(f"it ended without printing {text!r}:\n{printed}")


def wait_for_event(events: Path, event: str, *, step: int, timeout_s: float = 300, **details: object) -> None:
    """Return as soon as ``events.jsonl`` has such a line that was not there before."""
    deadline, seen = time.monotonic() + timeout_s, events.stat().st_size if events.exists() else 0
    wanted = {"event": event, "step": step, **details}
    while time.monotonic() < deadline:
        new = events.read_bytes()[seen:] if events.exists() else b""
        for line in new.splitlines(keepends=True):
            if line.endswith(b"\n") and wanted.items() <= json.loads(line).items():
                return
        time.sleep(0.002)
    raise AssertionError(f"{events} never had {wanted}")


def served_port(printed: str) -> str:
    """The port that a search server said it serves on."""
    found = re.search(r"serving on port (\d+)", printed)
    assert found is not None, printed
    return found[1]


def child(pid: int, module: str) -> int:
    """The process id of the child that runs ``module``."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            if int(parent) == pid and module.encode() in command:
                return int(entry.name)
    raise AssertionError(f"process {pid} has no child that runs {module}")


def rank(pid: int, number: int) -> int:
    """The process id of the rank ``number`` that the launcher ``pid`` has started."""
    for entry in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
        if f"RANK={number}".encode() in variables:
            return int(entry)
    raise AssertionError(f"process {pid} has no rank {number}")


def gone(pid: int, seconds: float) -> bool:
    """True if the process has ended, or does so in time; a zombie has."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False
