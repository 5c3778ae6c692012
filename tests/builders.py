"""Small things that several test files build."""

from __future__ import annotations

from searchrl.rewards import Components, Reward


def plain_reward(total: float) -> Reward:
    """A reward for an answer."""
    return Reward(
        components=Components(answer=total),
        exact_match=0.0,
        judged=None,
        valid_format=False,
        retrieval_hit=False,
        evidence=None,
    )
