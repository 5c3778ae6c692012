"""Invariants of the scaling simulation in benchmarks/: what must hold whatever the costs are."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def load() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "simulation.py"
    spec = importlib.util.spec_from_file_location("simulation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


simulation: Any = load()
COSTS = simulation.Costs(
    step_s=0.02, sequence_s=0.003, prefill_s=0.001, update_s=0.5, token_s=0.004, sync_s=1.0
)


def episodes(seed: int, count: int) -> list[Any]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        turns = [(rng.randint(1, 40), rng.randint(20, 90)) for _ in range(rng.randint(0, 3))]
        made.append(simulation.Episode(prompt=30, turns=(*turns, (rng.randint(1, 20), 0))))
    return made


def fixed(seconds: float) -> Any:
    return lambda: seconds


def test_one_episode_alone_takes_what_its_tokens_and_searches_cost() -> None:
    episode = simulation.Episode(prompt=10, turns=((5, 7), (3, 0)))
    played = simulation.rollout([episode], COSTS, fixed(2.0), slots=4)
    # 8 steps of one sequence, 17 prefilled tokens, one search
    assert played.busy_s == pytest.approx(8 * 0.023 + 17 * 0.001)
    assert played.seconds == pytest.approx(played.busy_s + 2.0)


def test_two_episodes_share_steps_but_not_tokens() -> None:
    pair = [simulation.Episode(prompt=0, turns=((4, 0),)), simulation.Episode(prompt=0, turns=((6, 0),))]
    played = simulation.rollout(pair, COSTS, fixed(0.0), slots=2)
    assert played.seconds == pytest.approx(6 * 0.02 + 10 * 0.003)
    queued = simulation.rollout(pair, COSTS, fixed(0.0), slots=1)
    assert queued.seconds == pytest.approx(10 * 0.02 + 10 * 0.003)


@pytest.mark.parametrize("lock_step", [False, True])
@pytest.mark.parametrize("slots", [1, 7, 64])
@pytest.mark.parametrize("seed", range(3))
def test_every_token_is_sampled_once(seed: int, slots: int, lock_step: bool) -> None:
    played = episodes(seed, 20)
    result = simulation.rollout(
        played, COSTS, simulation.lognormal(0.5, seed), slots=slots, lock_step=lock_step
    )
    assert result.sampled == sum(sampled for episode in played for sampled, _ in episode.turns)
    assert result.busy_s <= result.seconds + 1e-9


@pytest.mark.parametrize("latency_s", [0.0, 0.2, 3.0])
@pytest.mark.parametrize("slots", [5, 64])
@pytest.mark.parametrize("seed", range(4))
def test_continuous_rollouts_are_never_slower_than_lock_step(seed: int, slots: int, latency_s: float) -> None:
    played = episodes(seed, 24)
    continuous = simulation.rollout(played, COSTS, fixed(latency_s), slots=slots)
    locked = simulation.rollout(played, COSTS, fixed(latency_s), slots=slots, lock_step=True)
    # An answer that comes in the middle of a step waits for its end: at most one a turn.
    assert continuous.seconds <= locked.seconds + 4 * COSTS.step_s


def test_one_rank_waits_for_nobody() -> None:
    step = simulation.colocated([episodes(0, 16)], COSTS, fixed(0.0), slots=16)
    assert step.idle == pytest.approx(0.0, abs=1e-12)
    searching = simulation.colocated([episodes(0, 16)], COSTS, fixed(5.0), slots=16)
    assert searching.waiting == pytest.approx(0.0, abs=1e-12)
    assert searching.searching > 0.1


@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_balancing_moves_work_but_makes_none(ranks: int) -> None:
    own = [episodes(seed, 12) for seed in range(ranks)]
    as_sampled = simulation.update(own, COSTS, balanced=False)
    balanced = simulation.update(own, COSTS, balanced=True)
    assert sum(balanced) == pytest.approx(sum(as_sampled))
    assert max(balanced) < max(as_sampled)
    assert max(balanced) - min(balanced) < 0.2 * (max(as_sampled) - min(as_sampled))


def test_shares_of_a_step_add_up() -> None:
    ranks = [episodes(seed, 12) for seed in range(4)]
    latency = simulation.lognormal(1.0, 0)
    played = [simulation.rollout(rank, COSTS, latency, slots=12) for rank in ranks]
    step = simulation.colocated(ranks, COSTS, simulation.lognormal(1.0, 0), slots=12, balanced=False)
    updates = simulation.update(ranks, COSTS, balanced=False)
    worked = sum(one.busy_s for one in played) + sum(updates) + 4 * COSTS.sync_s
    assert (1 - step.idle) * 4 * step.seconds == pytest.approx(worked)


def test_a_split_does_all_the_work_at_the_speed_of_its_slower_side() -> None:
    ranks = [episodes(seed, 12) for seed in range(4)]
    everything = [episode for rank in ranks for episode in rank]
    step = simulation.split(ranks, COSTS, fixed(0.0), slots=12, trainers=1)
    trained = COSTS.update_s + COSTS.token_s * sum(episode.tokens for episode in everything)
    assert step.seconds == pytest.approx(trained + COSTS.sync_s)  # one trainer is the bottleneck
    assert 0.0 < step.idle < 1.0
