"""When rollouts run: each before its step's update or, with ``overlap``, during the update before it.

::

    overlap=false   | rollout 0 | update 0 | rollout 1 | update 1 | rollout 2 | …
    overlap=true    | rollout 0 | update 0            | update 1            | …
                                | rollout 1, policy 0 | rollout 2, policy 1 | …

Policy n has been updated n times. A rollout that begins early samples from a policy one update older than the
one that it trains, which the importance weights correct: the trainer's π_old over the engine's π_roll. When
rollouts begin follows from the configuration alone, never from who is faster, so a run can be repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent import futures
from threading import Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

from searchrl.config import Config
from searchrl.data.sampler import Sampler
from searchrl.errors import CleanStop

T = TypeVar("T")

_PATIENCE_S = 10.0
"""How long the end of a run waits for a rollout that it has cancelled."""


def starts_early(cfg: Config, step: int) -> bool:
    """Whether the rollout of ``step``, counted from 0, begins before the step before it is trained.

    Not beyond the last step, and not across a checkpoint: a resumed run can only sample from the policy that
    was saved, so an uninterrupted one does the same there.
    """
    return cfg.overlap and step < cfg.steps and not cfg.saving.is_due(step)


class Rollouts(Generic[T]):
    """Plays one rollout at a time, in a thread; while it runs, engine and event loop belong to it.

    Without ``overlap`` it runs while ``take`` waits. A context manager: leaving it cancels what still runs.
    """

    def __init__(
        self, play: Callable[[int], T], *, cfg: Config, sampler: Sampler, runner: asyncio.Runner
    ) -> None:
        """Start nothing yet.

        Args:
            play: the rollout of a step. Collectives in it need a process group of their own, because the
                trainer's run at the same time.
            cfg: says which rollouts begin early.
            sampler: what ``play`` draws questions from.
            runner: what ``play`` runs episodes in.
        """
        self.sampler = sampler
        self._play = play
        self._cfg = cfg
        self._runner = runner
        self._begun: futures.Future[T] | None = None
        self._state_before = sampler.state_dict()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel what runs. A thread that waits for other ranks cannot be: it dies with the process."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._begun is not None and not self._begun.done() and time.monotonic() < deadline:
            loop = self._runner.get_loop()
            for task in asyncio.all_tasks(loop):
                loop.call_soon_threadsafe(task.cancel)
            futures.wait([self._begun], timeout=0.1)  # again: the next round's tasks too

    def start_early(self, step: int) -> None:
        """Begin the rollout of ``step`` now if it ``starts_early``; returns at once."""
        if starts_early(self._cfg, step):
            self._start(step)

    def wait(self) -> None:
        """Return when no rollout runs: engine and event loop are free.

        Raises what the rollout raised, but for a `CleanStop`: that is for `take`, at the end of the step.
        """
        if self._begun is not None and not isinstance(self._begun.exception(), CleanStop):
            self._begun.result()

    def take(self, step: int) -> T:
        """The rollout of ``step``, which begins now unless it began early.

        Raises what it raised; then it is not taken, and a checkpoint goes on with its draws.
        """
        if self._begun is None:
            self._start(step)
        assert self._begun is not None
        played = self._begun.result()
        self._begun = None
        return played

    def sampler_state(self) -> dict[str, int | str]:
        """For a checkpoint: the sampler's state without the draws of a rollout that is not taken yet."""
        return self.sampler.state_dict() if self._begun is None else self._state_before

    def _start(self, step: int) -> None:
        self._state_before = self.sampler.state_dict()
        self._begun = futures.Future()
        # A daemon, unlike the threads of an executor: Ctrl-C must end it wherever it stands.
        Thread(target=_fulfil, args=(self._begun, self._play, step), name="rollout", daemon=True).start()


def _fulfil(future: futures.Future[T], play: Callable[[int], T], step: int) -> None:
    try:
        future.set_result(play(step))
    except BaseException as error:  # whatever it is, it is raised again where the rollout is waited for
        future.set_exception(error)
