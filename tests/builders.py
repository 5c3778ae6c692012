"""Small things that several test files build."""

from __future__ import annotations

from searchrl.rewards import Reward


def plain_reward(total: float) -> Reward:
    """A reward without components."""
    return Reward(
        total=total,
        exact_match=0.0,
        format_credit=0.0,
        evidence_credit=0.0,
        valid_format=False,
        retrieval_hit=False,
        evidence=None,
    )
