"""Rewards to advantages, over all groups of the global batch: pure Python, float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from searchrl.config import AdvantageConfig, AdvantageKind

STD_EPSILON = 1e-6
"""Added to the standard deviation, as in GRPO's reference implementations."""

VARIANCE_TOLERANCE = 1e-8
"""Rewards whose standard deviation is at most this do not vary: what is left is rounding noise."""

CustomAdvantages = Callable[[Sequence[Sequence[float]]], Sequence[Sequence[float]]]
"""Rewards to advantages: one list a group, one number a reward, in the same order."""


def has_signal(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards vary: at least two, of a sample standard deviation above the tolerance.

    Raises:
        ValueError: a reward is NaN or infinite.
    """
    if not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"rewards must be finite, got {list(rewards)}")
    return _std(rewards) > VARIANCE_TOLERANCE


def compute_advantages(
    groups: Sequence[Sequence[float]],
    config: AdvantageConfig,
    *,
    zero_variance_filter: bool,
    custom: CustomAdvantages | None = None,
) -> list[list[float] | None]:
    """Advantages of every group's surviving trajectories. Standard deviations are sample ones (n - 1).

    - ``grpo`` (arXiv 2402.03300, §4.1.2): (r - mean) / (std + 1e-6), of the group;
    - ``dr_grpo`` (arXiv 2503.20783): r - mean of the group;
    - ``rloo`` (arXiv 2402.14740): r - mean of the group's others;
    - ``reinforce_pp`` (arXiv 2501.03262): (r - mean) / (std + 1e-6), of all groups that stay.

    Args:
        groups: one reward per trajectory that is not void; groups may differ in size, or be empty.
        config: which kind.
        zero_variance_filter: whether groups without signal leave, before any statistic of the batch is taken.
            If not, the group-relative kinds give them exactly 0.
        custom: the function behind ``custom``; called with the groups that stay, if there are any.

    Returns:
        One entry per group: one advantage per reward, in order, or None for a group that must leave the
        loss's numerator *and* its denominator. An empty group always does.

    Raises:
        ValueError: a reward is NaN or infinite, or ``custom`` is missing or does not return one finite number
            per reward.
    """
    stays = [has_signal(group) or (not zero_variance_filter and len(group) > 0) for group in groups]
    remaining = [group for group, stay in zip(groups, stays, strict=True) if stay]
    advantages = iter(_advantages(remaining, config.kind, custom))
    return [next(advantages) if stay else None for stay in stays]


def _advantages(
    groups: Sequence[Sequence[float]], kind: AdvantageKind, custom: CustomAdvantages | None
) -> list[list[float]]:
    match kind:
        case AdvantageKind.grpo:
            return [_standardized(group) for group in groups]
        case AdvantageKind.dr_grpo:
            return [_centred(group) for group in groups]
        case AdvantageKind.rloo:
            # With n rewards of mean m, r - (n·m - r) / (n - 1) = (r - m)·n / (n - 1).
            return [
                [value * len(group) / max(len(group) - 1, 1) for value in _centred(group)] for group in groups
            ]
        case AdvantageKind.reinforce_pp:
            values = iter(_standardized([reward for group in groups for reward in group]))
            return [[next(values) for _ in group] for group in groups]
        case AdvantageKind.custom:
            if custom is None:
                raise ValueError("advantage.kind=custom needs a function; set advantage.import_path")
            return _checked(custom(groups), groups) if groups else []


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _centred(rewards: Sequence[float]) -> list[float]:
    """``r - mean``, and exactly 0 where that would be rounding noise."""
    if not has_signal(rewards):
        return [0.0] * len(rewards)
    mean = _mean(rewards)
    return [reward - mean for reward in rewards]


def _standardized(rewards: Sequence[float]) -> list[float]:
    scale = _std(rewards) + STD_EPSILON
    return [value / scale for value in _centred(rewards)]


def _checked(returned: Sequence[Sequence[float]], groups: Sequence[Sequence[float]]) -> list[list[float]]:
    """What a custom function returned, if it is one finite number per reward."""
    rule = "a custom advantage function must return one list per group and one finite number per reward"
    try:
        advantages = [[float(value) for value in values] for values in returned]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{rule}; it returned {returned!r}") from error
    if len(advantages) != len(groups):
        raise ValueError(f"{rule}; it returned {len(advantages)} lists for {len(groups)} groups")
    for rewards, values in zip(groups, advantages, strict=True):
        if len(values) != len(rewards) or not all(map(math.isfinite, values)):
            raise ValueError(f"{rule}; for rewards {list(rewards)} it returned {values}")
    return advantages
