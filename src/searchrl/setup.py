"""Builds what a run works with, in the order that the libraries need, and takes it down again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchrl.checkpoint import Checkpoints, Saved, identity_of
from searchrl.config import Config, ConfigError, DataConfig, RetrievalKind, RewardKind
from searchrl.console import Console
from searchrl.data.readers import read_examples
from searchrl.data.sampler import fingerprint
from searchrl.distributed import World, destroy_groups, init_world
from searchrl.engine import Engine, shutdown_engines
from searchrl.episodes import Rollout
from searchrl.models import resolve_model
from searchrl.phases import Events, Phases, no_events
from searchrl.preemption import StopRequest
from searchrl.protocol import Protocol, load_tokenizer
from searchrl.retrieval.lookup import read_passages
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.scoring import Scorer, open_scorer
from searchrl.sources import open_retriever, source_settings
from searchrl.tools import OracleTool, SearchTool, Tool
from searchrl.trajectory import Example

if TYPE_CHECKING:
    from searchrl.actor import Actor


@dataclass(kw_only=True, slots=True)
class Environment:
    """One rank's questions, tools and text protocol: what episodes live in, without a policy."""

    cfg: Config
    world: World
    console: Console
    runner: asyncio.Runner
    """One event loop for the whole run: engine and search connections live in it."""
    phases: Phases
    """Time and memory of each phase, and the log of what moves."""
    stop: StopRequest
    """Whether this rank was asked to stop. Training listens; everything else just ends."""
    run_dir: Path
    tokenizer: Any
    protocol: Protocol
    tool: Tool
    searches: RetrievalMeter
    """What this rank's searches did since it was last asked."""
    source: str
    """Names what decides search results."""
    score: Scorer
    """Rewards of groups, as ``reward`` says."""
    train_examples: list[Example]
    """Empty in an evaluation that needs none."""
    eval_examples: list[Example]


@dataclass(kw_only=True, slots=True)
class Run:
    """One rank's parts: an environment and a policy that samples in it."""

    env: Environment
    model: Path | str
    """The initial policy, warm start included."""
    engine: Engine
    rollout: Rollout


@contextmanager
def open_environment(
    cfg: Config, *, training: bool = True, with_policy: bool = True
) -> Iterator[Environment]:
    """Questions, tokenizer and retriever; stops what it started, whatever happens.

    Args:
        cfg: a validated configuration.
        training: False: an evaluation, which needs no training questions.
        with_policy: False: no engine and no actor will come, so torch.distributed is not started.
    """
    world = init_world(cfg.device, engine_size=cfg.engine.tensor_parallel, timeout_s=2 * cfg.stall_timeout_s)
    stop = StopRequest()
    console = Console(enabled=world.is_main, is_stopping=lambda: stop.asked is not None)
    train_examples, eval_examples = load_questions(cfg, training=training)
    if with_policy:
        from searchrl.actor import init_communication  # DeepSpeed takes seconds to import

        init_communication(world)
    with ExitStack() as stack:
        stack.callback(console.close)
        runner = stack.enter_context(asyncio.Runner())
        phases = stack.enter_context(_open_phases(cfg, world, training=training))
        tokenizer = load_tokenizer(resolve_model(cfg.checkpoint or cfg.model.path, Path(cfg.assets)))
        protocol = Protocol(tokenizer, cfg.episode)
        searches = RetrievalMeter()
        tool: Tool
        source = stack.enter_context(open_retriever(cfg, world, console, runner, searches))
        if cfg.retrieval.kind is RetrievalKind.oracle:
            tool = oracle(cfg, eval_examples)
        else:
            tool = SearchTool(source.retriever, top_k=cfg.episode.top_k)
        yield Environment(
            cfg=cfg,
            world=world,
            console=console,
            runner=runner,
            phases=phases,
            stop=stop,
            run_dir=Path(cfg.run_dir),
            tokenizer=tokenizer,
            protocol=protocol,
            tool=tool,
            searches=searches,
            source=source.identity,
            score=stack.enter_context(open_scorer(cfg.reward, protocol.eos_text, runner)),
            train_examples=train_examples,
            eval_examples=eval_examples,
        )


@contextmanager
def _open_phases(cfg: Config, world: World, *, training: bool) -> Iterator[Phases]:
    """``events.jsonl`` is written by the main rank of a training run."""
    writes = training and world.is_main
    phases = Phases(Path(cfg.run_dir) / "events.jsonl" if writes else None, device=world.device)
    phases.event("run_start", ranks=world.size)
    try:
        yield phases
    finally:
        phases.close()


def oracle(cfg: Config, examples: Sequence[Example]) -> OracleTool:
    """The tool of ``retrieval=oracle``: the gold passages of ``examples``, from ``retrieval.corpus``.

    Raises:
        ConfigError: a question names no gold passages.
        CorpusError: the corpus lacks one of them.
    """
    for example in examples:
        if not example.gold_passages:
            raise ConfigError(
                f"retrieval=oracle returns metadata.gold_passages, but question {example.id} of "
                f"{cfg.data.eval} names none; choose another retrieval, or questions that do"
            )
    ids = (id_ for example in examples for id_ in example.gold_passages)
    return OracleTool(read_passages(cfg.retrieval.corpus, ids))


@contextmanager
def open_run(cfg: Config, *, training: bool = True) -> Iterator[Run]:
    """An environment with the initial policy in an engine."""
    with open_environment(cfg, training=training) as env:
        yield load_policy(env, initial_policy(env))


@contextmanager
def open_training(cfg: Config) -> Iterator[tuple[Run, Checkpoints, Saved | None]]:
    """A run, its checkpoints, and the one that it continues from, which is checked before anything loads.

    Raises:
        CheckpointError: none is whole, or there is none, although ``resume=true``.
        ConfigError: it belongs to another run.
    """
    with open_environment(cfg) as env:
        checkpoints = Checkpoints(
            folder=env.run_dir / "checkpoints",
            saving=cfg.saving,
            world=env.world,
            identity=identity_of(
                cfg,
                model=resolve_model(cfg.checkpoint or cfg.model.path, Path(cfg.assets)),
                questions=fingerprint(env.train_examples),
                retrieval=env.source,
            ),
            changes=cfg.resume_changes,
            say=env.console.warn,
        )
        saved = checkpoints.find(must=cfg.resume is True) if cfg.resume else None
        run = load_policy(env, initial_policy(env))
        with env.stop:  # before, a signal ends the process at once: nothing is lost
            yield run, checkpoints, saved


def load_policy(env: Environment, model: Path | str) -> Run:
    """Load ``model`` into an engine that samples in ``env``."""
    cfg = env.cfg
    fetched = "" if isinstance(model, Path) else ", from the hub unless its cache has it"
    env.console.say(f"engine: loading {model}{fetched}")
    engine = load_engine(cfg, model, env.world, events=env.phases.event)
    rollout = Rollout(
        engine=engine,
        protocol=env.protocol,
        tool=env.tool,
        limits=cfg.episode,
        seed=cfg.seed,
        paused_s=env.searches.paused_s,
    )
    return Run(env=env, model=model, engine=engine, rollout=rollout)


def initial_policy(env: Environment) -> Path | str:
    """The model that training starts from: ``checkpoint``, else ``model.path`` after its warm start."""
    cfg = env.cfg
    model = resolve_model(cfg.checkpoint or cfg.model.path, Path(cfg.assets))
    if not cfg.warm_starts:
        return model
    ablations = (RetrievalKind.none, RetrievalKind.oracle)
    if cfg.retrieval.kind in ablations or cfg.retrieval.shuffle_documents:
        raise ConfigError(
            "the warm start needs real search results: evaluate a trained model under this retrieval with "
            "`searchrl eval … checkpoint=runs/NAME/model`, or train from one with checkpoint=…"
        )
    from searchrl.warmstart import WarmstartInputs, warmstart

    inputs = WarmstartInputs(
        model=model,
        tokenizer=env.tokenizer,
        protocol=env.protocol,
        tool=env.tool,
        examples=env.train_examples,
        fingerprint=_warmstart_fingerprint(env),
    )
    return warmstart(cfg, inputs, world=env.world, runner=env.runner, console=env.console)


def _warmstart_fingerprint(env: Environment) -> str:
    """What decides a warm start's data."""
    return " ".join([env.cfg.model.path, fingerprint(env.train_examples), *source_settings(env.cfg)])


def load_questions(cfg: Config, *, training: bool = True) -> tuple[list[Example], list[Example]]:
    """Training and held-out questions; an evaluation reads the former only for a warm start.

    Raises:
        DataError: a file is missing or malformed.
        ConfigError: the reward needs what the training questions do not say.
    """

    def read(path: str) -> list[Example]:
        return read_examples(Path(path), prompt_column=cfg.data.prompt_column)

    train = read(cfg.data.train) if training or cfg.warm_starts else []
    held_out = read(cfg.data.eval)
    _require_hops(train, cfg.data)
    if cfg.reward.kind is RewardKind.em_plus_evidence:
        for example in train:
            if not example.gold_passages:
                raise ConfigError(
                    f"reward.kind=em_plus_evidence pays for reading metadata.gold_passages, but question "
                    f"{example.id} of {cfg.data.train} names none; choose reward=em, or add them"
                )
    return train, held_out


def _require_hops(train: Sequence[Example], data: DataConfig) -> None:
    """Raise ``ConfigError`` if ``data.train_hops`` leaves no question to train on."""
    if train and data.train_hops and not any(example.hops in data.train_hops for example in train):
        there = sorted({example.hops for example in train})
        raise ConfigError(
            f"data.train_hops={list(data.train_hops)} leaves none of the {len(train):,} questions of "
            f"{data.train}, whose metadata.hops are {', '.join(map(str, there))} (0: not given); name some "
            "of these, or [] for all"
        )


def make_actor(run: Run) -> Actor:
    """The trained policy, starting from the run's model. An engine that takes turns makes room for it."""
    run.engine.sleep()
    return load_actor(run.env.cfg, run.model, run.env.world, events=run.env.phases.event)


def load_engine(cfg: Config, model: Path | str, world: World, *, events: Events = no_events) -> Engine:
    """An engine with the run's settings."""
    return Engine(
        model,
        cfg.engine,
        dtype=cfg.model.dtype,
        max_context_tokens=cfg.episode.max_context_tokens,
        seed=cfg.seed,
        world=world,
        events=events,
    )


def load_actor(cfg: Config, model: Path | str, world: World, *, events: Events = no_events) -> Actor:
    """An actor with the run's settings."""
    from searchrl.actor import Actor

    return Actor(
        model,
        model=cfg.model,
        optimizer=cfg.optimizer,
        zero_stage=cfg.deepspeed.zero_stage,
        temperature=cfg.sampling.temperature,
        logprob_chunk=cfg.batching.logprob_chunk,
        total_steps=cfg.steps,
        seed=cfg.seed,
        world=world,
        offloads=cfg.takes_turns,
        events=events,
    )


def end_runs() -> None:
    """Shut down what runs leave to the end of their process, for a process that goes on."""
    from searchrl.actor import forget_groups

    shutdown_engines()
    destroy_groups()
    forget_groups()
