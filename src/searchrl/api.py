"""The commands as functions, for people who script: ``from searchrl import train, evaluate, rollout``.

Each call does what the command of its name does, in this process and on one rank, and returns what came of
it. Settings are those of the configuration; see docs/python.md.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from searchrl.cli import check_machine, claim_run, prepare, run_evaluation, run_training
from searchrl.compose import load_config
from searchrl.config import Config, ConfigError, Device, SamplingConfig
from searchrl.launcher import require_one_process
from searchrl.overrides import Overrides, command_line_overrides, function_overrides
from searchrl.trajectory import Example, Group

if TYPE_CHECKING:
    from searchrl.evaluation.intervals import Interval
    from searchrl.evaluation.summary import Part
    from searchrl.rewards import ScoredGroup
    from searchrl.setup import Run

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_THREAD_VARIABLE = "OMP_WAIT_POLICY"


@dataclass(kw_only=True, slots=True, frozen=True)
class Evaluation:
    """How a policy answered the held-out questions."""

    parts: list[Part]
    """Rows of the table: data sources, hops, all, and with several sources their average. Every metric of a
    row is an interval: ``part.metrics["f1"].low``."""

    @property
    def exact_match(self) -> Interval:
        """Over all questions, with its 95 % interval."""
        return self._interval(self._all)

    @property
    def questions(self) -> int:
        """How many were asked."""
        return self._all.questions

    @property
    def by_source(self) -> dict[str, Interval]:
        """Exact match of every data source."""
        return {part.name: self._interval(part) for part in self.parts if part.kind == "data_source"}

    @property
    def _all(self) -> Part:
        return next(part for part in self.parts if part.kind == "all")

    @staticmethod
    def _interval(part: Part) -> Interval:
        interval = part.metrics["exact_match"]
        assert interval is not None  # there is no part without questions
        return interval


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainingResult:
    """What a training run leaves."""

    run_dir: Path
    """Everything that the run made: docs/operations.md."""
    model: Path
    """Folder of the trained model."""
    metrics: list[dict[str, float]]
    """The records of ``metrics.jsonl``: one a step, and one an evaluation, each with its ``step``."""
    before: Evaluation | None
    """Of the initial policy; None with ``eval.before=false``."""
    after: Evaluation
    """Of the trained one."""


def train(
    experiment: str | None = None,
    overrides: Overrides = (),
    *,
    name: str | None = None,
    reward: Callable[..., Any] | None = None,
    advantage: Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
    importance: Callable[..., Any] | None = None,
) -> TrainingResult:
    """``searchrl train``: warm start if configured, GRPO, evaluation before and after.

    Args:
        experiment: a file of conf/experiment, for example ``quickstart``.
        overrides: settings on top of it.
        name: names the run directory, runs/NAME; None: the experiment's.
        reward: a function of yours in place of the configured reward (docs/rewards.md), from the top level
            of a module: the run knows it by name. More arguments: overrides={"+reward.kwargs.cost": 0.05}.
        advantage: the same in place of the advantage (docs/algorithm.md).
        loss: the same in place of the loss.
        importance: the same in place of the importance weights.

    Raises:
        ConfigError: a setting cannot work, the run directory is taken, or the run would need several
            processes, which `searchrl train` starts.
        SearchrlError: what else stops a run; the message says what to do.
    """
    functions = {"reward": reward, "advantage": advantage, "loss": loss, "importance": importance}
    given = [*_words(experiment, name, overrides), *function_overrides(functions)]
    cfg, resolved = load_config(given)
    _refuse(cfg, "searchrl.train")
    claim_run(cfg, resolved)
    with _leaving_nothing():
        model = run_training(cfg, resolved)
    return _training_result(cfg, model)


def evaluate(
    checkpoint: str | Path | None = None,
    experiment: str | None = None,
    overrides: Overrides = (),
    *,
    name: str | None = None,
) -> Evaluation:
    """``searchrl eval``: answer ``data.eval``; the tables and all answers are kept in the run directory.

    Args:
        checkpoint: folder or hub name of a model; None: the initial policy of the configuration.
        experiment: a file of conf/experiment, for example ``quickstart``.
        overrides: settings on top of it.
        name: names the run directory, which must not be that of a training; None: the experiment's.

    Raises:
        ConfigError: as for ``train``.
        SearchrlError: what else stops an evaluation, for example too many failed searches.
    """
    given = _words(experiment, name, overrides, checkpoint)
    cfg, resolved = load_config(given, training=False)
    _refuse(cfg, "searchrl.evaluate")
    claim_run(cfg, resolved, training=False)
    with _leaving_nothing():
        return Evaluation(parts=run_evaluation(cfg, command=shlex.join(["searchrl", "eval", *given])))


class Policy:
    """A policy with its tools, ready to answer. From ``open_policy``."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._groups = 0

    @property
    def config(self) -> Config:
        """What it was opened with."""
        return self._run.env.cfg

    @property
    def questions(self) -> list[Example]:
        """Those of ``data.eval``."""
        return self._run.env.eval_examples

    def rollout(
        self, questions: Sequence[str | Example], *, samples: int = 1, temperature: float = 0.0
    ) -> list[Group]:
        """Answer every question ``samples`` times, many at once.

        Args:
            questions: texts, or examples of a data set, whose gold answers ``score`` compares with.
            samples: episodes of each question.
            temperature: 0 is greedy. The same calls in the same order give the same episodes.

        Returns:
            A group for each question, in their order. An episode whose search failed is in it, void:
            ``trajectory.outcome.is_void``.
        """
        from searchrl.evaluation.rollouts import chunk_questions

        if samples < 1 or temperature < 0:
            raise ConfigError(
                f"samples={samples}, temperature={temperature:g}: there must be at least one sample, and no "
                "temperature below 0"
            )
        run, first = self._run, self._groups
        numbered = [(first + i, _example(question, i)) for i, question in enumerate(questions)]
        self._groups += len(numbered)
        size = chunk_questions(run.env.cfg.engine.max_num_seqs, samples)
        sampling = SamplingConfig(temperature=temperature)
        groups: list[Group] = []
        for start in range(0, len(numbered), size):
            chunk = numbered[start : start + size]
            episodes = run.rollout.groups(chunk, group_size=samples, sampling=sampling)
            groups += run.engine.run(run.env.runner, episodes)
        return groups

    def score(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Rewards of groups, as the configuration's ``reward`` gives them; void episodes have none."""
        return self._run.env.score(groups)


@contextmanager
def open_policy(
    checkpoint: str | Path | None = None,
    experiment: str | None = None,
    overrides: Overrides = (),
    *,
    reward: Callable[..., Any] | None = None,
) -> Iterator[Policy]:
    """A policy in an engine, and the search that it needs, while the block lasts. Writes no run directory.

    Args:
        checkpoint: folder or hub name of a model; None: the initial policy of the configuration.
        experiment: a file of conf/experiment, for example ``quickstart``.
        overrides: settings on top of it.
        reward: a function of yours for ``Policy.score``, as for ``train``.

    Raises:
        ConfigError: as for ``train``.
        SearchrlError: the search or the model cannot be opened.
    """
    given = [*_words(experiment, None, overrides, checkpoint), *function_overrides({"reward": reward})]
    cfg, _ = load_config(given, training=False)
    _refuse(cfg, "searchrl.open_policy")
    check_machine(cfg, training=False)
    prepare(cfg)
    with _leaving_nothing(), TemporaryDirectory(prefix="searchrl-") as folder:
        from searchrl.setup import open_run

        cfg.run_dir = folder  # of the retriever's log
        with open_run(cfg, training=False) as run:
            yield Policy(run)


def rollout(
    questions: Sequence[str | Example],
    checkpoint: str | Path | None = None,
    experiment: str | None = None,
    overrides: Overrides = (),
    *,
    samples: int = 1,
    temperature: float = 0.0,
) -> list[Group]:
    """Open a policy, answer the questions, close it. Several calls share an engine in ``open_policy``.

    Arguments, result and errors are those of ``open_policy`` and ``Policy.rollout``.
    """
    with open_policy(checkpoint, experiment, overrides) as policy:
        return policy.rollout(questions, samples=samples, temperature=temperature)


def _words(
    experiment: str | None, name: str | None, overrides: Overrides, checkpoint: str | Path | None = None
) -> list[str]:
    """The arguments of a call as a command line; what was given last and most explicitly wins."""
    words = [] if experiment is None else [f"+experiment={experiment}"]
    words += command_line_overrides(overrides)
    words += [] if name is None else command_line_overrides({"name": name})
    return words + ([] if checkpoint is None else command_line_overrides({"checkpoint": checkpoint}))


def _example(question: str | Example, index: int) -> Example:
    if isinstance(question, Example):
        return question
    return Example(id=str(index), question=question, golden_answers=(), data_source="python")


def _training_result(cfg: Config, model: Path) -> TrainingResult:
    from searchrl.metrics import read_records

    run_dir = Path(cfg.run_dir)
    before = run_dir / "eval" / "step-000000.json"
    return TrainingResult(
        run_dir=run_dir,
        model=model,
        metrics=read_records(run_dir, cfg.steps),
        before=_read_evaluation(cfg, before) if before.exists() else None,
        after=_read_evaluation(cfg, run_dir / "eval" / f"step-{cfg.steps:06d}.json"),
    )


def _read_evaluation(cfg: Config, path: Path) -> Evaluation:
    from searchrl.evaluation.results import load_results
    from searchrl.evaluation.summary import summarize

    answered = {result.id: [result] for result in load_results(path)}
    return Evaluation(parts=summarize(answered, seed=cfg.seed))


def _refuse(cfg: Config, who: str) -> None:
    """What cannot run in this process is told before anything loads.

    Raises:
        ConfigError: it needs several processes, another run is open, or an event loop runs.
    """
    require_one_process(cfg, who)
    if "RANK" in os.environ:
        raise ConfigError(
            f"{who} cannot begin while a policy is open in this process, or under torchrun; leave the block "
            "of open_policy first"
        )
    if threading.current_thread() is not threading.main_thread() or _in_event_loop():
        raise ConfigError(
            f"{who} has an event loop and signal handlers of its own, so it cannot be called within an event "
            "loop (a notebook, an async function) or from another thread; call it from a plain script"
        )
    if cfg.device is Device.cpu and "torch" in sys.modules and _THREAD_VARIABLE not in os.environ:
        warnings.warn(
            "torch was imported before searchrl could set its threads: they spin while they wait, which "
            "costs much of the speed where cores are shared. Import torch after the first call of searchrl, "
            f"or start Python with {_THREAD_VARIABLE}=PASSIVE GOMP_SPINCOUNT=300000 in its environment",
            RuntimeWarning,
            stacklevel=3,
        )


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@contextmanager
def _leaving_nothing() -> Iterator[None]:
    """Whatever ends the block, no engine and no process group is left in this process, which goes on."""
    handlers = {sent: signal.getsignal(sent) for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        from searchrl.setup import end_runs

        end_runs()
        for sent, handler in handlers.items():
            signal.signal(sent, handler)
        for variable in _RANK_VARIABLES:
            os.environ.pop(variable, None)
