"""Real runs of the command line for `inject.py`: started, watched, searched for what they leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

SOURCE = Path(__file__).resolve().parents[2] / "src"
MARK = "SEARCHRL_FAULT_RUN"
PATIENCE_S = 900.0
"""For what takes seconds on an idle machine."""
SERVER = "searchrl.retrieval.server"
SETTINGS = (
    "+experiment=smoke",
    "eval={questions: 2, before: false}",
    "saving.keep=3",
    "retrieval.timeout_s=2",
    "retrieval.deadline_s=4",
    "retrieval.patience_s=120",
)


@dataclass(kw_only=True)
class Folder:
    """A run directory."""

    folder: Path

    def records(self) -> list[dict[str, Any]]:
        """Its steps' metrics."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if "time/step" in record]

    def checkpoints(self) -> list[str]:
        """Names of its complete checkpoints."""
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*"))


@dataclass(kw_only=True)
class Run(Folder):
    """A run in a process of its own. Everything it starts carries its mark in the environment."""

    process: subprocess.Popen[str]
    mark: str
    shared: set[str]
    """What lay in shared memory before."""
    temporary: Path
    """The run's own folder for temporary files."""
    events_from: int
    """Bytes of ``events.jsonl`` that earlier runs of the folder wrote."""
    printed: list[str] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line)

    @property
    def text(self) -> str:
        return "".join(self.printed)

    def await_text(self, pattern: str, seconds: float = PATIENCE_S) -> re.Match[str]:
        """The first match of ``pattern`` in what the run prints."""
        return until(lambda: re.search(pattern, self.text), seconds, f"{pattern!r} in:\n{self.text}")

    def await_events(self, seen: Callable[[list[dict[str, Any]]], bool], seconds: float = PATIENCE_S) -> None:
        """Wait until ``seen`` accepts the events that this run has written."""
        path = self.folder / "events.jsonl"

        def look() -> bool | None:
            with path.open(encoding="utf-8") as file:
                file.seek(self.events_from)
                lines = [line for line in file.read().splitlines(keepends=True) if line.endswith("\n")]
            return seen([json.loads(line) for line in lines]) or None

        until(look, seconds, f"events in:\n{self.text}", pause_s=0.002)

    def end(self, seconds: float = PATIENCE_S) -> int:
        """Wait for the end; the exit code."""
        code = self.process.wait(seconds)
        time.sleep(0.5)
        return code

    def pids(self) -> dict[int, str]:
        """Processes that carry the run's mark, with their command lines."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (
                            (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                        )
                except OSError:  # it has just ended
                    continue
        return {pid: command for pid, command in found.items() if command}  # a zombie has none

    def pid_of(self, part: str, *, rank: int | None = None) -> int:
        """The process whose command line contains ``part``, of a rank if there are several."""
        for pid, command in self.pids().items():
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if part in command and (rank is None or f"RANK={rank}".encode() in variables):
                return pid
        raise SystemExit(f"no process of the run has {part!r} in its command: {self.pids()}")

    def left(self, seconds: float = 20.0) -> list[str]:
        """Processes, shared memory and temporary files left of the run after at most ``seconds``."""
        deadline = time.monotonic() + seconds
        while (alive := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)
        files = sorted(_shared_memory() - self.shared) + [
            path.name
            for path in self.temporary.iterdir()
            if not path.name.startswith("torchinductor_")  # torch's cache of compiled code, meant to stay
        ]
        return [f"process {command[:60]}" for command in alive.values()] + files


@contextmanager
def started(where: Path, name: str, *overrides: str, **variables: str) -> Iterator[Run]:
    """A running `searchrl train`; killed at the end of the block, if it has not ended."""
    mark = uuid.uuid4().hex
    command = [
        sys.executable,
        "-m",
        "searchrl.cli",
        "train",
        *SETTINGS,
        f"name={name}",
        *overrides,
    ]
    folder, shared, temporary = where / "runs" / name, _shared_memory(), where / "tmp" / mark
    temporary.mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", MARK: mark, "TMPDIR": str(temporary)}
    events = folder / "events.jsonl"
    events_from = events.stat().st_size if events.exists() else 0
    process = subprocess.Popen(
        command,
        cwd=where,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # not ignored, as by `&`
    )
    run = Run(
        process=process, folder=folder, mark=mark, shared=shared, temporary=temporary, events_from=events_from
    )
    reader = threading.Thread(target=run.read, daemon=True)
    reader.start()
    try:
        yield run
    finally:
        for pid in run.pids():
            os.kill(pid, signal.SIGKILL)
        process.wait()


def finished(where: Path, name: str, *overrides: str, **variables: str) -> Run:
    """A run without a fault, at its end."""
    with started(where, name, *overrides, **variables) as run:
        code = run.end()
        if code != 0:
            raise SystemExit(f"{name} ended with {code}:\n{run.text}")
        return run


T = TypeVar("T")


def until(look: Callable[[], T | None], seconds: float, what: str, *, pause_s: float = 0.05) -> T:
    """What ``look`` finds, as soon as it finds something."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:g} s in vain for {what}")
        time.sleep(pause_s)
    return found


def _shared_memory() -> set[str]:
    return {str(path) for path in Path("/dev/shm").iterdir()}
