"""When rollouts run, which policy they sample from, what a checkpoint holds, and how failures end them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from searchrl.config import Config, SavingConfig
from searchrl.data import Sampler
from searchrl.errors import CleanStop
from searchrl.overlap import Rollouts, starts_early
from searchrl.trajectory import Example


class TrainingError(Exception):
    """Stands for whatever may go wrong in training."""


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as opened:
        yield opened


def config(*, overlap: bool, steps: int = 9, every: int = 0) -> Config:
    return Config(overlap=overlap, steps=steps, saving=SavingConfig(every=every))


def sampler() -> Sampler:
    return Sampler([Example(id="q", question="?", golden_answers=("a",), data_source="t")], seed=0)


class Trainer:
    """The loop's skeleton: a policy that ages by one with each step, and what was seen of it."""

    def __init__(self, cfg: Config, runner: asyncio.Runner, start: int = 0) -> None:
        self.cfg = cfg
        self.runner = runner
        self.steps = range(start, cfg.steps)
        self.version = start
        self.is_training = False
        self.saved: dict[int, int | str] = {}
        """Cursor of the sampler by the step after which it would be saved."""

    def play(self, step: int) -> tuple[int, int, bool]:
        """The step, the policy sampled from, and whether another was trained meanwhile. Two draws."""
        version = self.version
        self.draws.take(1)
        during = self.runner.run(self._watched())
        self.draws.take(1)
        assert self.version == version, "weights must not change under a rollout"
        return step, version, during

    async def _watched(self) -> bool:
        """True as soon as training is seen; it begins at once, or not before the rollout has ended."""
        for _ in range(50):
            if self.is_training:
                return True
            await asyncio.sleep(0.001)
        return False

    def train(self) -> list[tuple[int, int, bool]]:
        self.draws = sampler()
        played = []
        with Rollouts(self.play, cfg=self.cfg, sampler=self.draws, runner=self.runner) as rollouts:
            for step in self.steps:
                played.append(rollouts.take(step))
                rollouts.start_early(step + 1)
                self.is_training = True
                time.sleep(0.01)
                rollouts.wait()
                self.is_training = False
                self.runner.run(asyncio.sleep(0))  # the sync's probe: the loop is free
                self.version += 1
                self.saved[step + 1] = rollouts.sampler_state()["cursor"]
        return played


@pytest.mark.parametrize(
    ("overlap", "start", "steps", "every", "lags"),
    [
        (False, 0, 3, 0, [0, 0, 0]),
        (True, 0, 1, 0, [0]),
        (True, 0, 5, 0, [0, 1, 1, 1, 1]),
        # What follows a checkpoint begins after it …
        (True, 0, 7, 3, [0, 1, 1, 0, 1, 1, 0]),
        (True, 0, 6, 3, [0, 1, 1, 0, 1, 1]),
        (True, 0, 3, 1, [0, 0, 0]),
        # … so that a resumed run does what an uninterrupted one did.
        (True, 3, 7, 3, [0, 1, 1, 0]),
        (True, 3, 3, 3, []),
    ],
)
def test_a_rollout_is_as_old_as_the_configuration_says(
    runner: asyncio.Runner, overlap: bool, start: int, steps: int, every: int, lags: list[int]
) -> None:
    cfg = config(overlap=overlap, steps=steps, every=every)
    trainer = Trainer(cfg, runner, start)
    played = trainer.train()
    assert [step for step, *_ in played] == list(range(start, steps))
    assert [step - version for step, version, _ in played] == lags
    assert [during for *_, during in played] == [lag == 1 for lag in lags]
    assert [starts_early(cfg, step) for step in range(start + 1, steps)] == [lag == 1 for lag in lags[1:]]
    # A checkpoint after n steps goes on with the draws of the next one, whether they are made already or not.
    assert trainer.saved == {step + 1: 2 * (step + 1 - start) for step in range(start, steps)}


def test_a_failed_rollout_is_raised_where_it_is_waited_for(runner: asyncio.Runner) -> None:
    def play(step: int) -> None:
        raise TrainingError(f"in the rollout of step {step}")

    cfg = config(overlap=True)
    with Rollouts(play, cfg=cfg, sampler=sampler(), runner=runner) as rollouts:
        rollouts.start_early(4)
        for awaited in (rollouts.wait, lambda: rollouts.take(4)):
            with pytest.raises(TrainingError, match="in the rollout of step 4") as caught:
                awaited()
            assert "play" in [entry.name for entry in caught.traceback]


def test_a_rollout_that_stops_the_run_lets_the_step_end_and_is_not_taken(runner: asyncio.Runner) -> None:
    """A checkpoint after it goes on with its draws."""
    draws = sampler()

    def play(step: int) -> None:
        draws.take(2)
        if step == 1:
            raise CleanStop("between two steps")

    with Rollouts(play, cfg=config(overlap=True), sampler=draws, runner=runner) as rollouts:
        rollouts.take(0)
        rollouts.start_early(1)
        rollouts.wait()
        assert draws.state_dict()["cursor"] == 4
        with pytest.raises(CleanStop, match="between two steps"):
            rollouts.take(1)
        assert rollouts.sampler_state()["cursor"] == 2


def fail(rollouts: Rollouts[None], begun: threading.Event) -> None:
    """Training fails while a rollout runs."""
    with rollouts:
        rollouts.start_early(1)
        assert begun.wait(10)
        raise TrainingError


@pytest.mark.parametrize("scoring_s", [0.0, 0.3])
def test_a_failure_of_training_cancels_the_rollout(runner: asyncio.Runner, scoring_s: float) -> None:
    """Its episodes, or those of the next round, if it is between two when training fails."""
    begun = threading.Event()
    ended: list[str] = []

    async def episodes() -> None:
        begun.set()
        try:
            await asyncio.sleep(600)
        finally:
            ended.append("cancelled")

    def play(step: int) -> None:
        if scoring_s:
            begun.set()
            time.sleep(scoring_s)
        runner.run(episodes())

    start = time.monotonic()
    with pytest.raises(TrainingError):
        fail(Rollouts(play, cfg=config(overlap=True), sampler=sampler(), runner=runner), begun)
    assert ended == ["cancelled"]
    assert time.monotonic() - start < 5
    assert runner.run(asyncio.sleep(0, "free")) == "free"  # to close connections


def test_a_rollout_that_nothing_can_cancel_does_not_hold_the_end_up(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for another rank, say, whose training failed as well."""
    monkeypatch.setattr("searchrl.overlap._PATIENCE_S", 0.2)
    begun, never = threading.Event(), threading.Event()

    def play(step: int) -> None:
        begun.set()
        never.wait(30)

    with pytest.raises(TrainingError):
        fail(Rollouts(play, cfg=config(overlap=True), sampler=sampler(), runner=runner), begun)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "rollout")
    assert thread.daemon, "the process ends without it"
    never.set()
    thread.join()
