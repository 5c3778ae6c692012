"""Scores groups as ``reward`` says: presets, a function of the user's own, a judge."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from searchrl.config import AnswerScore, RewardConfig, RewardKind
from searchrl.extensions import load_function
from searchrl.judge import Judge
from searchrl.rewards import CustomReward, ScoredGroup, open_claims, score_group
from searchrl.trajectory import Group

Scorer = Callable[[Sequence[Group]], list[ScoredGroup]]
"""Rewards of groups. With a judge it runs the event loop, so it is not called from inside of it."""


@contextmanager
def open_scorer(reward: RewardConfig, eos_text: str, runner: asyncio.Runner) -> Iterator[Scorer]:
    """Scores groups, with the function or the judge that ``reward`` names; a judge gets all groups at once.

    Raises:
        SearchrlError: function, key or cache cannot be used.
    """
    custom = _custom_reward(reward)
    with ExitStack() as stack:
        judge = None
        if reward.answer_score is AnswerScore.judge:
            judge = Judge(reward.judge)
            stack.callback(lambda opened: runner.run(opened.aclose()), judge)

        def scorer(groups: Sequence[Group]) -> list[ScoredGroup]:
            verdicts = None if judge is None else runner.run(judge.verdicts(open_claims(groups)))
            return [
                score_group(group, reward, eos_text, custom=custom, verdicts=verdicts) for group in groups
            ]

        yield scorer


def _custom_reward(reward: RewardConfig) -> CustomReward | None:
    if reward.kind not in (RewardKind.custom, RewardKind.custom_group):
        return None
    function = load_function(reward.import_path, reward.kwargs, section="reward", positional=2)
    if reward.kind is RewardKind.custom_group:
        return function
    return lambda trajectories, example: [function(trajectory, example) for trajectory in trajectories]
