"""Being asked to stop, by SIGTERM or SIGUSR1 as clusters preempt, or by Ctrl-C; and saving before.

A signal only leaves a note here. A run looks at it where it can stop without loss: while episodes run, which
are dropped, and where ranks exchange what they have, so that all of them stop at the same place.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from searchrl.distributed import gather_objects
from searchrl.environment import LAUNCHER_VARIABLE, say_stopping
from searchrl.errors import CleanStop

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

RESUME_ME = 75
"""Exit code of a run that was preempted: EX_TEMPFAIL of sysexits.h, try again later."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(CleanStop):
    """Some rank was asked to stop."""

    def __init__(self, sent: signal.Signals) -> None:
        super().__init__(f"stopped by {sent.name}; resume=true continues")
        self.exit_code = 128 + sent if sent is signal.SIGINT else RESUME_ME


class StopRequest:
    """Whether this rank was asked to stop. Signals are noticed while the ``with`` block runs."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        """The first signal that asked."""
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        """Take notice from now on. In the main thread only."""
        self._before = {sent: signal.signal(sent, self._notice) for sent in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Signals do again what they did; not after one has asked: another must not cut the stop short."""
        if self.asked is None:
            for sent, handler in self._before.items():
                signal.signal(sent, handler)  # type: ignore[arg-type]  # as `signal` returned it

    def ask(self, sent: signal.Signals) -> None:
        """Stop as soon as nothing is lost by it. From another rank, or from the handler of a signal."""
        self.asked = self.asked or sent

    def gather(self, value: T, group: ProcessGroup | None = None) -> list[T]:
        """`distributed.gather_objects`, at a place where a run can stop. A collective.

        Raises:
            Preempted: on every rank, if any was asked to stop.
        """
        told = gather_objects((self.asked, value), group)
        for sent, _ in told:
            if sent is not None:
                raise Preempted(sent)
        return [theirs for _, theirs in told]

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del frame
        is_first = self.asked is None and os.environ.get("RANK", "0") == "0"
        if is_first and LAUNCHER_VARIABLE not in os.environ:  # else the launcher tells
            say_stopping(number)
        self.ask(signal.Signals(number))
        # Python's own handlers would have to wait for a collective to end.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


NEVER = StopRequest()
"""For what runs outside of training, and ends with its process."""


@contextmanager
def saved_before_stop(
    step: int, *, save: Callable[[int], object], say: Callable[[str], None]
) -> Iterator[None]:
    """A block that may stop the run, after ``step`` steps: they are saved before the stop goes on.

    Args:
        step: steps done.
        save: saves after so many steps, unless that is done already.
        say: tells the user.
    """
    try:
        yield
    except CleanStop:
        save(step)
        say(f"saved after step {step}; resume=true continues")
        raise
