"""Rules over a run's metrics that notice a collapsing policy early.

A rule compares the mean of one metric over the last ``watch.window`` steps with a bound. All but one bounds
move with the run's own best (or usual) window so far, because what is normal depends on model and task; only
windows within the bound count for that, so that no collapse becomes the new normal.

A step without the metric (the update was skipped, no trajectory was correct) leaves its rule as it is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from searchrl.config import WatchAction, WatchConfig
from searchrl.errors import CleanStop


class CollapseError(CleanStop):
    """A bound is crossed, and ``watch.action=stop``."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Rule:
    """One metric and its bound, ``factor`` x ``reference`` + ``offset``."""

    name: str
    metric: str
    is_floor: bool = False
    """The metric must not fall below the bound; else it must not rise above it."""
    reference: Callable[[Sequence[float]], float] | None = None
    """``min``, ``max`` or ``median`` of the means of earlier windows within the bound; None: no reference."""
    factor: float = 0.0
    offset: float = 0.0
    meaning: str
    """What it usually means when the bound is crossed."""
    remedy: str
    """What to try."""

    def bound(self, earlier: Sequence[float]) -> float:
        """The bound after windows with these means; infinite, so that all is well, before the first."""
        if self.reference is None:
            return self.offset
        if not earlier:
            return -math.inf if self.is_floor else math.inf
        return self.factor * self.reference(earlier) + self.offset

    def holds(self, mean: float, bound: float) -> bool:
        """True if the mean is within the bound; NaN never is."""
        return mean >= bound if self.is_floor else mean <= bound


_STEPS = (
    Rule(
        name="gradient",
        metric="update/grad_norm",
        reference=median,
        factor=10.0,
        meaning="gradients explode, usually from tokens of low probability",
        remedy="a lower optimizer.lr or optimizer.max_grad_norm; loss=llds",
    ),
    Rule(
        name="ratio",
        metric="tis/ratio_max",
        reference=median,
        factor=100.0,
        meaning="single tokens are far likelier to the trainer than to the engine; truncation hides it",
        remedy="importance=mis, which drops their trajectories, or sync.checksum=true",
    ),
    Rule(
        name="drift",
        metric="loss/policy_k3",
        reference=median,
        factor=10.0,
        offset=0.1,
        meaning="a rollout's optimizer steps move the policy much further than they used to",
        remedy="a lower optimizer.lr, fewer update.epochs or update.minibatches, a smaller loss.eps_high",
    ),
)

_BEHAVIOUR = (
    Rule(
        name="repetition",
        metric="collapse/repetition",
        reference=min,
        factor=1.0,
        offset=0.2,
        meaning="turns repeat themselves",
        remedy="an earlier checkpoint and a lower optimizer.lr; read trajectories/",
    ),
    Rule(
        name="thinking",
        metric="collapse/think_words",
        is_floor=True,
        reference=max,
        factor=0.25,
        meaning="the policy has all but stopped to think",
        remedy="reward=em_plus_format, which pays for thinking; read trajectories/",
    ),
    Rule(
        name="unanswered",
        metric="collapse/unanswered",
        reference=min,
        factor=1.0,
        offset=0.4,
        meaning="many more episodes than before end without an answer",
        remedy="a lower optimizer.lr, or wider limits in episode.*; rollout/outcome/* says how they end",
    ),
    Rule(
        name="searches",
        metric="search_r1/search_calls_per_sample",
        is_floor=True,
        reference=max,
        factor=0.25,
        meaning="the policy has all but stopped to search",
        remedy="check retrieval/recall_at_k, that is whether searching helps; reward=em_plus_evidence",
    ),
)


def rules(config: WatchConfig) -> list[Rule]:
    """All rules but ``config.ignore``.

    The first three follow the stages of lazy likelihood displacement (arXiv 2512.04220), ``mismatch`` is
    PROTOCOL §5's alarm; ``gradient``, ``ratio`` and ``drift`` see numbers on their way to overflow (what is
    not finite any more stops the run before its step: ``guards``); the others see what a collapse looks like
    in episodes. Their bounds keep clear of what healthy runs do (docs/operations.md).
    """
    likelihoods = [
        Rule(
            name="likelihood",
            metric="collapse/logprob_correct",
            is_floor=True,
            reference=max,
            factor=1.0,
            offset=-config.likelihood_fall,
            meaning="correct trajectories become less likely, the first sign of a collapse under GRPO",
            remedy="loss=llds, or a lower optimizer.lr, from a checkpoint before the fall",
        ),
        Rule(
            name="entropy",
            metric="loss/entropy",
            reference=min,
            factor=3.0,
            offset=0.1,
            meaning="the policy gets less and less sure of its tokens",
            remedy="a lower optimizer.lr, loss.kl_coef above 0, or no loss.entropy_coef",
        ),
        Rule(
            name="mismatch",
            metric="tis/ess_ratio",
            is_floor=True,
            offset=config.min_ess_ratio,
            meaning="engine and trainer disagree about the probability of what was sampled",
            remedy="fewer update.epochs or update.minibatches, importance=mis; check sync/probe_max_abs_diff",
        ),
    ]
    return [rule for rule in (*likelihoods, *_STEPS, *_BEHAVIOUR) if rule.name not in config.ignore]


@dataclass(kw_only=True, slots=True, frozen=True)
class Alarm:
    """A rule whose bound is crossed."""

    rule: Rule
    mean: float
    bound: float
    window: int

    def __str__(self) -> str:
        """What, by how much, what it usually means, what to try."""
        rule = self.rule
        side, sign = ("below", "<") if rule.is_floor else ("above", ">")
        return (
            f"{rule.name}: {rule.metric} is {side} its bound ({self.mean:.4g} {sign} {self.bound:.4g}, "
            f"mean of {self.window} steps): {rule.meaning}. Try {rule.remedy}"
        )


@dataclass(slots=True)
class _Track:
    """What one rule remembers."""

    recent: deque[float]
    means: list[float] = field(default_factory=list)
    """Of earlier windows within the bound."""


class Watch:
    """The rules, and what they have seen of a run."""

    def __init__(self, config: WatchConfig, records: Iterable[Mapping[str, float]] = ()) -> None:
        """Begin, or go on after ``records``.

        Args:
            config: the run's.
            records: metrics of the steps already done, in order; what a watch remembers follows from them.
        """
        self._stops = config.action is WatchAction.stop
        self._window = config.window
        self._tracks = [(rule, _Track(deque(maxlen=config.window))) for rule in rules(config)]
        self._alarms: dict[str, Alarm] = {}
        for record in records:
            self.observe(record)

    @property
    def alarms(self) -> list[Alarm]:
        """Of the rules whose bounds are crossed now."""
        return list(self._alarms.values())

    def must_stop(self) -> bool:
        """True if a bound is crossed now and ``watch.action=stop``: also right after a resume."""
        return self._stops and bool(self._alarms)

    def observe(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """Judge a step; returns the alarms that it raises, not those that were raised before and last."""
        before = set(self._alarms)
        for rule, track in self._tracks:
            if rule.metric not in metrics:
                continue
            track.recent.append(metrics[rule.metric])
            if len(track.recent) < self._window:
                continue
            mean, bound = fmean(track.recent), rule.bound(track.means)
            self._alarms.pop(rule.name, None)
            if rule.holds(mean, bound):
                track.means.append(mean)
            else:
                self._alarms[rule.name] = Alarm(rule=rule, mean=mean, bound=bound, window=self._window)
        return [alarm for name, alarm in self._alarms.items() if name not in before]

    def metrics(self) -> dict[str, float]:
        """``watch/<rule>``: 1 while its bound is crossed, else 0."""
        return {f"watch/{rule.name}": float(rule.name in self._alarms) for rule, _ in self._tracks}
