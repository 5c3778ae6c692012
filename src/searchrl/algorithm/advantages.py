"""Rewards of one group to advantages: pure Python, float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

STD_EPSILON = 1e-6
"""Added to the standard deviation, as in GRPO's reference implementations."""

VARIANCE_TOLERANCE = 1e-8
"""A group whose standard deviation is at most this has no signal, only rounding noise."""


def group_advantages(rewards: Sequence[float]) -> list[float] | None:
    """GRPO's advantages of one group's surviving trajectories (arXiv 2402.03300, eq. in 4.1.2).

    ``A_i = (r_i - mean(r)) / (std(r) + 1e-6)`` with the sample standard deviation (n - 1).

    Args:
        rewards: one reward per trajectory that is not void; groups may differ in size.

    Returns:
        One advantage per reward, in order; ``None`` for a group without a signal (fewer than two members, or
        no variance), which must leave the loss's numerator *and* its denominator.

    Raises:
        ValueError: a reward is NaN or infinite.
    """
    if not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"rewards must be finite, got {list(rewards)}")
    if len(rewards) < 2:
        return None
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
    if std <= VARIANCE_TOLERANCE:
        return None
    return [(reward - mean) / (std + STD_EPSILON) for reward in rewards]
