"""Which trajectories reach the optimizer, with which advantage and under which name."""

from __future__ import annotations

import math

import pytest

from searchrl.objective import to_samples
from searchrl.rewards import Reward, ScoredGroup
from searchrl.trajectory import Example, Finish, Group, Outcome, Trajectory, Turn

EXAMPLE = Example(id="q", question="?", golden_answers=("x",), data_source="t")


def scored(group_id: int, rewards: list[float | None]) -> ScoredGroup:
    """A group of trajectories with these rewards; None for a void one."""
    trajectories = [
        Trajectory(
            prompt_ids=[group_id, index],
            turns=[Turn(token_ids=[1], logprobs=[-1.0], text="", finish=Finish.STOP, policy_version=0)],
            outcome=Outcome.TOOL_FAILED if reward is None else Outcome.ANSWERED,
            answer=None,
        )
        for index, reward in enumerate(rewards)
    ]
    made = [
        None
        if reward is None
        else Reward(
            total=reward,
            exact_match=0.0,
            format_credit=0.0,
            evidence_credit=0.0,
            valid_format=False,
            retrieval_hit=False,
            evidence=None,
        )
        for reward in rewards
    ]
    return ScoredGroup(group=Group(id=group_id, example=EXAMPLE, trajectories=trajectories), rewards=made)


def test_a_group_becomes_samples_with_group_relative_advantages() -> None:
    samples = to_samples([scored(7, [1.0, 0.0, 0.0, 1.0])])
    std = math.sqrt(4 * 0.25 / 3)
    assert [sample.advantage for sample in samples] == [
        pytest.approx(sign * 0.5 / (std + 1e-6)) for sign in (1, -1, -1, 1)
    ]
    assert [sample.id for sample in samples] == ["7/0", "7/1", "7/2", "7/3"]
    assert [sample.trajectory.prompt_ids for sample in samples] == [[7, 0], [7, 1], [7, 2], [7, 3]]


@pytest.mark.parametrize(
    "rewards",
    [
        [0.0, 0.0, 0.0],
        [1.0, 1.0],
        [0.1 + 0.2, 0.3],  # equal but for rounding
        [1.0],
        [None, None],
        [None, 1.0],  # one survivor has nothing to be compared with
        [None, 1.0, None, 1.0],
        [],
    ],
)
def test_a_group_without_a_signal_is_dropped(rewards: list[float | None]) -> None:
    assert to_samples([scored(0, rewards)]) == []


def test_void_trajectories_are_left_out_and_the_others_keep_their_names() -> None:
    samples = to_samples([scored(3, [None, 1.0, None, 0.0, 0.5])])
    assert [sample.id for sample in samples] == ["3/1", "3/3", "3/4"]
    assert [sample.trajectory.prompt_ids for sample in samples] == [[3, 1], [3, 3], [3, 4]]
    assert [sample.advantage for sample in samples] == [
        pytest.approx(a / (0.5 + 1e-6)) for a in (0.5, -0.5, 0.0)
    ]
    assert all(not sample.trajectory.outcome.is_void for sample in samples)


def test_a_void_member_does_not_count_as_a_reward_of_zero() -> None:
    """The survivors' advantages are those of a group in which the void one never was."""
    with_void = to_samples([scored(0, [1.0, None, 0.2, 0.0])])
    without = to_samples([scored(0, [1.0, 0.2, 0.0])])
    assert [sample.advantage for sample in with_void] == [sample.advantage for sample in without]


def test_groups_are_compared_each_for_itself() -> None:
    samples = to_samples([scored(1, [0.0, 1.0]), scored(2, [1.0, 1.0]), scored(4, [10.0, 11.0])])
    assert [sample.id for sample in samples] == ["1/0", "1/1", "4/0", "4/1"]
    assert [sample.advantage for sample in samples[:2]] == pytest.approx(
        [sample.advantage for sample in samples[2:]]
    )


def test_a_reward_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="rewards must be finite"):
        to_samples([scored(0, [math.nan, 1.0])])
