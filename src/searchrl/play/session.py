"""The session of `searchrl play`: questions from a person or the data set, an episode for each."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from searchrl.config import Config, ConfigError, RetrievalKind, SamplingConfig
from searchrl.engine import Engine
from searchrl.episodes import Player, Rollout
from searchrl.errors import nearest
from searchrl.play.players import DroppedError, Person, Stage, WatchedEngine, WatchedTool
from searchrl.play.screen import Screen, visible
from searchrl.setup import Environment, initial_policy, load_policy, open_environment
from searchrl.trajectory import Example, Group, Trajectory

_HELP = """\
Type a question; or
  :random         any question of data.eval
  :example ID     that one
  :help           this
Ctrl-C drops an episode, Ctrl-D ends."""


def play(cfg: Config, given: argparse.Namespace) -> None:
    """Answer questions until the input ends; leaves nothing behind but an index and models under ``assets``.

    Args:
        cfg: a configuration that is valid for an evaluation; its ``run_dir`` is replaced.
        given: what `play.argument_parser` has parsed.

    Raises:
        SystemExit: 1, if the only question was not played to its end: a search failed, or the person left.
        ConfigError: there is no such example, or it cannot be asked under this retrieval.
    """
    if given.temperature < 0:
        raise ConfigError(f"--temperature={given.temperature:g} must not be negative; 0 is greedy")
    with tempfile.TemporaryDirectory(prefix="searchrl-play-") as folder:
        cfg.run_dir = folder  # of the retriever's log
        with _opened(cfg, human=given.human) as (env, engine):
            session = Session(env, engine, SamplingConfig(temperature=given.temperature))
            if given.question is not None:
                example = typed(given.question)
            elif given.example is not None:
                example = session.find(given.example)
            elif given.random:
                example = session.any()
            else:
                session.loop()
                return
            try:
                trajectory = session.ask(example)
            except EOFError:  # the person has gone
                trajectory = None
    if trajectory is None or trajectory.outcome.is_void:
        raise SystemExit(1)


def typed(question: str) -> Example:
    """A question of the person's own: nobody knows the answer."""
    return Example(id="typed", question=question, golden_answers=(), data_source="terminal")


@contextmanager
def _opened(cfg: Config, *, human: bool) -> Iterator[tuple[Environment, Engine | None]]:
    with open_environment(cfg, training=False, with_policy=not human) as env:
        yield env, None if human else load_policy(env, initial_policy(env)).engine


@dataclass(slots=True)
class Session:
    """An environment in which a person watches, or acts."""

    env: Environment
    engine: Engine | None
    """None: the person acts."""
    sampling: SamplingConfig
    screen: Screen = field(default_factory=Screen)
    _asked: int = 0

    def loop(self) -> None:
        """Questions until the input ends."""
        if sys.stdin.isatty():
            import readline  # noqa: F401  # gives `input` its line editing

        self.screen.say(_HELP)
        while True:
            try:
                if (example := self._next(read_line("\nquestion> ").strip())) is not None:
                    self.ask(example)
            except KeyboardInterrupt:
                self.screen.say("")
            except EOFError:
                self.screen.say("")
                return
            except ConfigError as error:
                self.screen.say(str(error), "red")

    def find(self, id_: str) -> Example:
        """The held-out question of this id.

        Raises:
            ConfigError: there is none; names the nearest.
        """
        by_id = {example.id: example for example in self.env.eval_examples}
        if id_ not in by_id:
            near = nearest(id_, by_id)
            hint = f"did you mean {near}?" if near else f"the first is {next(iter(by_id), 'none')}"
            raise ConfigError(f"{self.env.cfg.data.eval} has no question {id_}; {hint}")
        return by_id[id_]

    def any(self) -> Example:
        """One of the held-out questions."""
        return random.choice(self.env.eval_examples)

    def ask(self, example: Example) -> Trajectory | None:
        """One episode on the screen, with its score if gold answers are known; None if it was dropped.

        Raises:
            ConfigError: an oracle knows nothing of a question of the person's own.
            EOFError: the person's input has ended.
        """
        env = self.env
        if env.cfg.retrieval.kind is RetrievalKind.oracle and not example.gold_passages:
            raise ConfigError(
                "retrieval=oracle finds the gold passages of a question, and nobody knows those of this one; "
                "take one of the data set (:random), or choose another retrieval"
            )
        if example.golden_answers:
            self.screen.say(f"question {example.id}: {visible(example.question)}")
        begin = time.monotonic()
        rollout, self._asked = self._rollout(), self._asked + 1

        async def episode() -> list[Trajectory]:
            return [await rollout.episode(example, self.sampling, key=f"{self._asked}/0")]

        try:
            (trajectory,) = rollout.engine.run(env.runner, episode())
        except (KeyboardInterrupt, DroppedError):
            self.screen.say("dropped", "red")
            return None
        self.screen.close()
        if self.engine is None:
            self.screen.stream(trajectory, env.protocol)
        self.screen.ending(trajectory, time.monotonic() - begin)
        if example.golden_answers:
            group = Group(id=self._asked, example=example, trajectories=[trajectory])
            self.screen.score(env.score([group])[0], example)
        return trajectory

    def _rollout(self) -> Rollout:
        env = self.env
        stage = Stage(screen=self.screen, protocol=env.protocol, exact=self.engine is None)
        player: Player = Person(stage=stage, ask=read_line, echoes=not sys.stdin.isatty())
        if self.engine is not None:
            player = WatchedEngine(engine=self.engine, stage=stage)
        return Rollout(
            engine=player,
            protocol=env.protocol,
            tool=WatchedTool(tool=env.tool, stage=stage),
            limits=env.cfg.episode,
            seed=env.cfg.seed,
        )

    def _next(self, line: str) -> Example | None:
        command, _, argument = line.partition(" ")
        match command:
            case "":
                return None
            case ":random":
                return self.any()
            case ":example":
                return self.find(argument.strip())
            case _ if line.startswith(":"):
                self.screen.say(_HELP)
                return None
            case _:
                return typed(line)


def read_line(prompt: str) -> str:
    """A line from the input; only a terminal is prompted.

    Ctrl-C ends the waiting, also within an event loop, which would only note it.

    Raises:
        EOFError: the input has ended.
        KeyboardInterrupt: Ctrl-C.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input(prompt if sys.stdin.isatty() else "")
    finally:
        signal.signal(signal.SIGINT, before)
