"""Small things that several test files build."""

from __future__ import annotations

from searchrl.evaluation.results import Result
from searchrl.rewards import Components, Reward
from searchrl.trajectory import Outcome

PLAIN_RESULT = Result(
    id="0",
    data_source="t",
    hops=0,
    outcome=Outcome.ANSWERED,
    exact_match=False,
    f1=0.0,
    sub_exact_match=False,
    valid_format=False,
    retrieval_hit=False,
    searches=0,
    searches_with_gold=0,
    sampled_tokens=0,
    total_tokens=0,
    error=None,
)
"""A wrong answer without a search."""


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
