"""Notices that a run hangs, and says which rank is behind and in which phase.

A rank that hangs inside a collective or a library cannot speak for itself. A thread of each rank writes the
rank's newest sign of life into a store that all share, and reads the others'. If none of them changes for
too long, the run hangs: the thread tells what each rank did last, writes down where this one's threads
stand, and ends the process. What a rank measures is its own monotonic time; no two clocks are compared.

A request to stop travels the same way, to ranks that got no signal.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from searchrl.distributed import World, open_store
from searchrl.launcher import tell_launcher
from searchrl.phases import Phases, Sign
from searchrl.preemption import StopRequest

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_PERIOD_S = 1.0
_ASLEEP_S = 60.0
"""A thread that comes so late to its next look saw nothing of what happened meanwhile."""


class Heartbeat:
    """One rank's signs of life, told to all, while the ``with`` block runs."""

    def __init__(
        self, phases: Phases, stop: StopRequest, *, world: World, timeout_s: float, run_dir: Path
    ) -> None:
        """Begin when the block does.

        Args:
            phases: has this rank's signs.
            stop: whether this rank was asked to stop; hears of requests to others.
            world: this rank.
            timeout_s: how long all ranks may be silent.
            run_dir: gets ``stalled.rankR.txt``, the stacks of a hanging rank's threads.
        """
        self._phases = phases
        self._stop = stop
        self._world = world
        self._timeout_s = timeout_s
        self._stacks = run_dir / f"stalled.rank{world.rank}.txt"
        self._store: Store | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        """Begin. A collective."""
        self._store = open_store(self._world)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, also while the store does not answer any more."""
        self._done.set()
        self._thread.join(5 * _PERIOD_S)

    def _run(self) -> None:
        signs = [Sign(0, "start", 0, 0)] * self._world.size
        changed = [time.monotonic()] * self._world.size
        looked = time.monotonic()
        while not self._done.wait(min(_PERIOD_S, self._timeout_s / 4)):
            before, looked = looked, time.monotonic()
            if (
                looked - before > _ASLEEP_S
            ):  # this process was stopped, by Ctrl-Z say, with all others or alone
                changed = [looked] * self._world.size
            for rank, sign in enumerate(self._exchange(signs)):
                if sign != signs[rank]:
                    signs[rank], changed[rank] = sign, looked
            silent = [looked - then for then in changed]
            if min(silent) > self._timeout_s and not self._done.is_set():
                self._end(stalled(signs, silent, self._timeout_s))

    def _exchange(self, known: Sequence[Sign]) -> list[Sign]:
        """Tell this rank's sign; every rank's newest, or the one that is known."""
        signs = list(known)
        signs[self._world.rank] = self._phases.sign
        with suppress(RuntimeError):  # rank 0 has gone, and the store with it: nothing is new
            assert self._store is not None
            self._store.set(str(self._world.rank), json.dumps([self._phases.sign, self._stop.asked]))
            for rank in range(self._world.size):
                if rank != self._world.rank and self._store.check([str(rank)]):
                    sign, asked = json.loads(self._store.get(str(rank)))
                    signs[rank] = Sign(*sign)
                    if asked is not None:
                        self._stop.ask(signal.Signals(asked))
        return signs

    def _end(self, message: str) -> None:
        """Say what hangs, once for all ranks, and end this process, whatever its other threads do."""
        with self._stacks.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        stacks = f"{self._stacks.parent}/stalled.rank*.txt"
        message = f"searchrl: {message}\nwhere each rank's threads stand: {stacks}"
        is_first = True
        with suppress(RuntimeError):
            assert self._store is not None
            is_first = self._store.add("told", 1) == 1
        if is_first and not tell_launcher(message, 1):
            print(message, file=sys.stderr, flush=True)
        time.sleep(3 * _PERIOD_S)  # who ends takes the others along: they notice too, and write their stacks
        os._exit(1)


def stalled(signs: Sequence[Sign], silent_s: Sequence[float], timeout_s: float) -> str:
    """What is told of a run that hangs: every rank's last sign of life, and who is behind.

    Args:
        signs: by rank.
        silent_s: seconds since then, by rank.
        timeout_s: what was too long.
    """
    lines = [f"no rank has given a sign of life for stall_timeout_s={timeout_s:g} s; what each did last:"]
    lines += [
        f"  rank {rank}: {sign.doing}, step {sign.step}, for {silent:.0f} s"
        for rank, (sign, silent) in enumerate(zip(signs, silent_s, strict=True))
    ]
    behind = min(sign.begun for sign in signs)
    late = [rank for rank, sign in enumerate(signs) if sign.begun == behind]
    if len(late) < len(signs):
        lines.append(f"the others wait for rank {', '.join(map(str, late))}")
    return "\n".join(lines)
