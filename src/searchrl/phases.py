"""What a run does when: seconds and memory peak of each phase, and a log of what moves in between.

A step on a device that engine and trainer share is a sequence of turns: roll out, put the engine to sleep,
bring the optimizer back, update, take it away, wake the engine with new weights. ``events.jsonl`` has a line
for the start and the end of every phase and for every such transition, written when it has happened.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO

from searchrl.distributed import reduce_values

GIB = 2**30


class Events(Protocol):
    """Takes notice of transitions; ``Phases.event`` writes them down."""

    def __call__(self, event: str, **details: object) -> None:
        """``event`` has just happened; ``details`` are JSON values."""


class Sign(NamedTuple):
    """A sign of life: where a rank is, and that it moves."""

    step: int
    doing: str
    """The phase, or what lies between two."""
    begun: int
    """Phases begun so far: ranks of a run begin the same ones."""
    number: int
    """Signs so far."""


def no_events(event: str, **details: object) -> None:
    """Takes no notice."""


class Phases:
    """``with phases("rollout"): …`` measures a phase of the step; ``metrics`` says what was measured."""

    def __init__(self, path: Path | None, *, device: str) -> None:
        """Start measuring.

        Args:
            path: ``events.jsonl``, which is continued; None on ranks that write none.
            device: ``cpu``, or the rank's GPU.
        """
        self.step = 0
        """Optimizer steps of the run begun so far; stands in every line."""
        self._file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)  # a warm start alone claims no run directory
            self._file = path.open("a", encoding="utf-8")
        self._memory: _Memory = _HostMemory() if device == "cpu" else _DeviceMemory()
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._baseline = self._memory.peak()
        self.sign = Sign(0, "start", 0, 0)
        """The newest sign of life of this rank; other threads read it."""

    def beat(self, doing: str | None = None) -> None:
        """Give a sign of life; from any thread. ``doing``: what begins now, outside of the phases."""
        _, before, begun, number = self.sign
        self.sign = Sign(self.step, doing or before, begun, number + 1)

    def alive(self, advance: Callable[[object], None]) -> Callable[[object], None]:
        """``advance``, with a sign of life at every call."""

        def advanced(item: object) -> None:
            self.beat()
            advance(item)

        return advanced

    def event(self, event: str, **details: object) -> None:
        """Write a line: ``step``, ``event``, ``time`` in seconds since 1970, and the details."""
        self._memory.mark()
        self.beat()
        if self._file is not None:
            line = {"step": self.step, "event": event, "time": round(time.time(), 6), **details}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the block's wall time to ``phase``, and note how high memory rose. Phases do not nest."""
        self.sign = self.sign._replace(doing=phase, begun=self.sign.begun + 1)
        self.event("phase_start", phase=phase)
        self._memory.restart()
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds, peak = time.perf_counter() - start, self._memory.peak()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
            self._peaks[phase] = max(self._peaks.get(phase, 0), peak)
            self.event("phase_end", phase=phase, seconds=round(seconds, 6), peak_gib=round(peak / GIB, 3))
            self.beat(f"after {phase}")

    def metrics(self) -> dict[str, float]:
        """What was measured since the last call. A collective.

        ``time/<phase>`` in seconds and their sum ``time/step``; ``memory/<phase>_peak_gib``, the most of any
        rank, and ``memory/baseline_gib``, what it used before anything was loaded.
        """
        seconds, peaks = self._seconds, self._peaks
        self._seconds, self._peaks = {}, {}
        *highest, baseline = reduce_values([peak / GIB for peak in (*peaks.values(), self._baseline)], "max")
        return {
            **{f"time/{phase}": value for phase, value in seconds.items()},
            "time/step": sum(seconds.values()),
            **{f"memory/{phase}_peak_gib": value for phase, value in zip(peaks, highest, strict=True)},
            "memory/baseline_gib": baseline,
        }

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class _Memory(Protocol):
    def restart(self) -> None:
        """Forget the peak so far."""

    def mark(self) -> None:
        """Something has just been moved."""

    def peak(self) -> int:
        """Bytes, the most since ``restart``."""


class _HostMemory:
    """The process's resident set. Linux keeps its peak and forgets it on demand.

    Where a sandbox forbids the demand the peak would be that of the whole run, and what is resident when
    somebody asks stands in for it.
    """

    _STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    _FORGET_PEAK = "5"  # proc(5)

    def __init__(self) -> None:
        self._field = "VmHWM:"
        self.restart()

    def restart(self) -> None:
        try:
            self._CLEAR.write_text(self._FORGET_PEAK, encoding="ascii")
        except OSError:
            self._field = "VmRSS:"

    def mark(self) -> None:
        """The kernel sees every moment."""

    def peak(self) -> int:
        lines = self._STATUS.read_text(encoding="ascii").splitlines()
        (kibibytes,) = (line.split()[1] for line in lines if line.startswith(self._field))
        return int(kibibytes) * 1024


class _DeviceMemory:
    """Memory in use on this rank's GPU, what CUDA, NCCL and other processes hold included.

    The device says only what is in use now. How far torch's share of that rose in between, torch knows; but
    it counts a sleeping engine's tensors as its own, though the device has them no more. So the difference
    between the two is taken anew whenever something has moved.
    """

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self.restart()

    def restart(self) -> None:
        self._cuda.reset_peak_memory_stats()
        self._peak = 0
        self.mark()

    def mark(self) -> None:
        free, total = self._cuda.mem_get_info()
        besides_torch = total - free - self._cuda.memory_reserved()
        self._peak = max(self._peak, besides_torch + self._cuda.max_memory_allocated())
        self._cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        self.mark()
        return self._peak
