"""A training step on N ranks, simulated: rollouts turn by turn, barriers, balanced updates.

Times are seconds on the simulated clock. An engine decodes its sequences together: a step yields one token
for each and takes a fixed time plus one for each sequence and for each token that it prefills. Not modelled:
collectives, the prefix cache beyond a trajectory's own stream, and ranks that are slower than others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from searchrl.batching import balance
from searchrl.trajectory import Outcome, Sample, Trajectory

SIGMA = 0.6
"""Of the logarithm of search latencies."""

Latency = Callable[[], float]
"""Seconds of the next search."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Costs:
    """Seconds on one rank."""

    step_s: float
    """A decoding step, however few sequences it decodes."""
    sequence_s: float
    """One more sequence in it, so one more token."""
    prefill_s: float
    """A token of a prompt or an observation."""
    update_s: float
    """An update without samples."""
    token_s: float
    """A trained token, prompt and observations included."""
    sync_s: float
    """Weights from the trainer to the engine, the probe included."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Episode:
    """Lengths of one trajectory in tokens."""

    prompt: int
    turns: tuple[tuple[int, int], ...]
    """Sampled and then appended; the last turn appends nothing."""
    trained: bool = True
    """False: its group's rewards do not vary, so it is left out of the update."""

    @property
    def tokens(self) -> int:
        return self.prompt + sum(sampled + appended for sampled, appended in self.turns)


@dataclass(kw_only=True, slots=True, frozen=True)
class Played:
    """One rank's rollout."""

    seconds: float
    busy_s: float
    """Of them, those in which the engine worked; in the others every episode was searching."""
    sampled: int


@dataclass(slots=True, eq=False)
class _Player:
    """An episode under way."""

    episode: Episode
    ready_s: float = 0.0
    turn: int = 0
    left: int = 0
    prefill: int = 0


def rollout(
    episodes: Sequence[Episode], costs: Costs, latency: Latency, *, slots: int, lock_step: bool = False
) -> Played:
    """Play ``episodes`` on one engine that decodes at most ``slots`` of them at a time.

    Continuous: whoever has an answer goes on. Lock-step: nobody searches before all who still play have
    asked, and nobody goes on before all are answered.
    """
    clock = busy = 0.0
    sampled = 0
    waiting = [_begin(_Player(episode=episode), 0.0) for episode in episodes]
    running: list[_Player] = []
    asked: list[_Player] = []
    while waiting or running or asked:
        if lock_step and not waiting and not running:
            answered = clock + max(latency() for _ in asked)
            waiting = [_begin(player, answered) for player in asked]
            asked = []
        ready = [player for player in waiting if player.ready_s <= clock][: slots - len(running)]
        if not running and not ready:
            clock = min(player.ready_s for player in waiting)
            continue
        waiting = [player for player in waiting if player not in ready]
        running += ready
        seconds = costs.step_s + costs.sequence_s * len(running)
        seconds += costs.prefill_s * sum(player.prefill for player in ready)
        clock += seconds
        busy += seconds
        sampled += len(running)
        for player in running:
            player.left -= 1
        done = [player for player in running if player.left == 0]
        running = [player for player in running if player.left > 0]
        for player in done:
            player.turn += 1
            if player.turn == len(player.episode.turns):
                continue
            if lock_step:
                asked.append(player)
            else:
                waiting.append(_begin(player, clock + latency()))
    return Played(seconds=clock, busy_s=busy, sampled=sampled)


def _begin(player: _Player, ready_s: float) -> _Player:
    """Prepare the player's next turn, which may start at ``ready_s``."""
    player.ready_s = ready_s
    player.left = player.episode.turns[player.turn][0]
    appended = player.episode.prompt if player.turn == 0 else player.episode.turns[player.turn - 1][1]
    player.prefill = appended
    return player


def update(ranks: Sequence[Sequence[Episode]], costs: Costs, *, balanced: bool) -> list[float]:
    """Seconds of each rank's update, of its own episodes or of those that ``batching.balance`` gives it."""
    ranks = [[episode for episode in rank if episode.trained] for rank in ranks]
    if balanced:
        everything = [episode for rank in ranks for episode in rank]
        samples = [
            Sample(
                trajectory=Trajectory(
                    prompt_ids=[0] * episode.tokens, turns=[], outcome=Outcome.ANSWERED, answer=None
                ),
                advantage=0.0,
                id=str(index),
            )
            for index, episode in enumerate(everything)
        ]
        ranks = [[everything[int(sample.id)] for sample in part] for part in balance(samples, len(ranks))]
    return [costs.update_s + costs.token_s * sum(episode.tokens for episode in rank) for rank in ranks]


@dataclass(kw_only=True, slots=True, frozen=True)
class Step:
    """One step of all ranks together."""

    seconds: float
    searching: float
    """Share of all ranks' seconds in which an engine had nothing to do but wait for searches."""
    waiting: float
    """Share in which a rank waited for other ranks, at the barriers after rollout and update."""

    @property
    def idle(self) -> float:
        return self.searching + self.waiting


def colocated(
    ranks: Sequence[Sequence[Episode]],
    costs: Costs,
    latency: Latency,
    *,
    slots: int,
    lock_step: bool = False,
    balanced: bool = True,
) -> Step:
    """Every rank rolls out, all wait, every rank trains, all wait, weights are synced."""
    played = [rollout(rank, costs, latency, slots=slots, lock_step=lock_step) for rank in ranks]
    updates = update(ranks, costs, balanced=balanced)
    seconds = max(one.seconds for one in played) + max(updates) + costs.sync_s
    everything = seconds * len(ranks)
    searching = sum(one.seconds - one.busy_s for one in played) / everything
    worked = sum(one.seconds for one in played) + sum(updates) + costs.sync_s * len(ranks)
    return Step(seconds=seconds, searching=searching, waiting=1 - worked / everything)


def split(
    ranks: Sequence[Sequence[Episode]], costs: Costs, latency: Latency, *, slots: int, trainers: int
) -> Step:
    """``trainers`` ranks train the step before while the others roll out the next (one-step-off).

    The episodes of all ranks are dealt out to those that roll out, and balanced over those that train.
    """
    everything = [episode for rank in ranks for episode in rank]
    samplers = len(ranks) - trainers
    played = [rollout(everything[i::samplers], costs, latency, slots=slots) for i in range(samplers)]
    updates = update([everything[i::trainers] for i in range(trainers)], costs, balanced=True)
    seconds = max(*(one.seconds for one in played), *updates) + costs.sync_s
    total = seconds * len(ranks)
    searching = sum(one.seconds - one.busy_s for one in played) / total
    worked = sum(one.seconds for one in played) + sum(updates) + costs.sync_s * len(ranks)
    return Step(seconds=seconds, searching=searching, waiting=1 - worked / total)


def lognormal(mean_s: float, seed: int) -> Latency:
    """Lognormal latencies; none at all if the mean is 0."""
    rng = random.Random(seed)
    if mean_s == 0:
        return lambda: 0.0
    return lambda: rng.lognormvariate(math.log(mean_s) - SIGMA**2 / 2, SIGMA)
