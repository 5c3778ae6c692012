"""One step's groups: rounds of episodes until enough of them have something to teach.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2), in at most ``max_rounds`` rounds, and over-sampling: a
round starts more groups than it needs and aborts what is still running when it has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from searchrl.algorithm.advantages import has_signal
from searchrl.config import ResamplingConfig
from searchrl.data.sampler import Sampler
from searchrl.preemption import NEVER, StopRequest
from searchrl.rewards import ScoredGroup
from searchrl.trajectory import Example, Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Play = Callable[[Sequence[tuple[int, Example]], Callable[[Group], bool]], list[Group]]
"""Plays the groups of (id, example) until all are complete or one for which the function returns True is.

That is ``Rollout.groups``, with the rest of its arguments, run to its end.
"""


@dataclass(kw_only=True, slots=True, frozen=True)
class Collected:
    """What one step's rounds brought this rank: complete groups, scored, in the order of their ids."""

    chosen: list[ScoredGroup]
    """To train on; at most ``groups_per_step`` over all ranks."""
    left_out: list[ScoredGroup]
    """Without a signal, if there are several rounds to find others; or more than the step needs."""
    metrics: dict[str, float]
    """Of all ranks together, the same on each."""

    @property
    def scored(self) -> list[ScoredGroup]:
        """Chosen and left out: what metrics, transcripts and the count of failures are about."""
        return sorted(self.chosen + self.left_out, key=lambda item: item.group.id)


def collect(
    sampler: Sampler,
    play: Play,
    score: Callable[[Sequence[Group]], list[ScoredGroup]],
    *,
    groups_per_step: int,
    resampling: ResamplingConfig,
    group: ProcessGroup | None = None,
    stop: StopRequest = NEVER,
) -> Collected:
    """Draw, play and score this engine's share of every round. A collective.

    With one round a step takes every complete group. With more it takes groups whose rewards vary; each round
    draws as many questions as are missing, and after the last the step takes what there is.

    Args:
        sampler: shares each draw among the engines.
        play: runs episodes on this rank's engine; returns none on ranks that only follow.
        score: rewards of groups; sees each once, all of a round together unless it is over-sampled.
        groups_per_step: groups that a step trains on, over all ranks.
        resampling: how many rounds, and how many groups are started for one that is needed.
        group: the ranks' process group, if this is not the thread that uses the default one.
        stop: whether this rank was asked to stop.

    Raises:
        Preempted: on every rank, if any was asked to stop.
    """
    is_dynamic = resampling.max_rounds > 1
    mine: list[ScoredGroup] = []
    signals: dict[int, bool] = {}  # of every complete group of all ranks: has it a signal?
    rounds = sampled = 0
    while rounds < resampling.max_rounds and (missing := groups_per_step - sum(signals.values())) > 0:
        share = missing / sampler.engines
        count = sampler.engines * math.ceil(resampling.oversample * share)
        if resampling.oversample > 1:
            quota = _Quota(score=score, needed=math.ceil(share), needs_signal=is_dynamic)
            play(sampler.take(count), quota)
            scored = quota.scored
        else:  # nothing to stop: scores can wait for the end of the episodes
            scored = score(play(sampler.take(count), lambda _: False))
        for part in stop.gather({item.group.id: _has_signal(item) for item in scored}, group):
            signals |= part
        mine += scored
        rounds += 1
        sampled += count
    eligible = sorted(id_ for id_, has_signal in signals.items() if has_signal or not is_dynamic)
    chosen = set(eligible[:groups_per_step])
    mine.sort(key=lambda item: item.group.id)
    return Collected(
        chosen=[item for item in mine if item.group.id in chosen],
        left_out=[item for item in mine if item.group.id not in chosen],
        metrics={
            "rollout/rounds": float(rounds),
            "rollout/groups_sampled": float(sampled),
            "rollout/groups_aborted": float(sampled - len(signals)),
            "rollout/groups_surplus": float(len(eligible) - len(chosen)),
            "rollout/zero_variance_groups": float(len(signals) - sum(signals.values())),
            "rollout/informative_groups": sum(signals.values()) / len(signals),
        },
    )


@dataclass(kw_only=True, slots=True)
class _Quota:
    """Scores groups as they complete and tells when this engine has those it needs."""

    score: Callable[[Sequence[Group]], list[ScoredGroup]]
    needed: int
    needs_signal: bool
    scored: list[ScoredGroup] = field(default_factory=list)
    counted: int = 0

    def __call__(self, group: Group) -> bool:
        (item,) = self.score([group])
        self.scored.append(item)
        self.counted += not self.needs_signal or _has_signal(item)
        return self.counted >= self.needed


def _has_signal(item: ScoredGroup) -> bool:
    """True if the survivors' rewards vary by more than rounding."""
    return has_signal([reward.total for _, _, reward in item.survivors])
