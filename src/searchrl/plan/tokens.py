"""Trajectories, tokens and steps of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from searchrl.config import Config
from searchrl.data.readers import first_of_each_source, read_examples
from searchrl.trajectory import Example


@dataclass(kw_only=True, slots=True, frozen=True)
class TokenPlan:
    """Trajectories, tokens and steps of a run; "most" means that every episode goes to its limits."""

    trajectories_per_step: int
    longest_episode: int
    """Tokens besides the prompt."""
    most_tokens_per_step: int
    """Over all ranks, each trajectory as long as the context."""
    most_microbatches: int
    """Of one rank and step, no prefix shared."""
    optimizer_steps_per_rollout: int
    optimizer_steps: int
    questions_drawn: int
    """At least: dynamic sampling and over-sampling draw more."""
    train_questions: int | None
    """In ``data.train``; None: the file is not there."""
    eval_questions: int | None
    """Of the evaluation after training; None: the file is not there."""


def plan_tokens(cfg: Config, *, world_size: int, read_data: bool = True) -> TokenPlan:
    """Tokens and steps; counts the questions in the data files that are there.

    Raises:
        DataError: a data file is malformed.
    """
    episode, trajectories = cfg.episode, cfg.groups_per_step * cfg.group_size
    longest = (episode.max_searches + 1) * episode.max_turn_tokens
    longest += episode.max_searches * episode.max_observation_tokens
    rows = max(1, cfg.batching.max_tokens // episode.max_context_tokens)
    per_rollout = cfg.update.epochs * cfg.update.minibatches
    share = math.ceil(trajectories / world_size / cfg.update.minibatches)
    train, held_out = (_questions(cfg.data.train), _questions(cfg.data.eval)) if read_data else (None, None)
    hops = cfg.data.train_hops
    evaluated = None if held_out is None else first_of_each_source(held_out, cfg.eval.questions)
    return TokenPlan(
        trajectories_per_step=trajectories,
        longest_episode=longest,
        most_tokens_per_step=trajectories * episode.max_context_tokens,
        most_microbatches=math.ceil(share / rows) * per_rollout,
        optimizer_steps_per_rollout=per_rollout,
        optimizer_steps=cfg.steps * per_rollout,
        questions_drawn=cfg.steps * cfg.groups_per_step,
        train_questions=None if train is None else sum(not hops or e.hops in hops for e in train),
        eval_questions=None if evaluated is None else len(evaluated),
    )


def _questions(path: str) -> list[Example] | None:
    """The questions of a data file, if it is there."""
    return read_examples(Path(path)) if Path(path).is_file() else None
