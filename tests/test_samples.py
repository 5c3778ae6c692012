"""Which trajectories reach the optimizer, with which advantage and under which name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest

from builders import plain_reward
from searchrl.config import AdvantageConfig, AdvantageKind, FilterConfig
from searchrl.distributed import World
from searchrl.rewards import ScoredGroup
from searchrl.samples import to_samples, unscored_samples
from searchrl.trajectory import Example, Finish, Group, Outcome, Sample, Trajectory, Turn

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
    made = [None if reward is None else plain_reward(reward) for reward in rewards]
    return ScoredGroup(group=Group(id=group_id, example=EXAMPLE, trajectories=trajectories), rewards=made)


ALONE = World(rank=0, size=1, local_rank=0, device="cpu")


def samples_of(
    groups: Sequence[ScoredGroup],
    *,
    kind: AdvantageKind = AdvantageKind.grpo,
    filters: FilterConfig | None = None,
    penalties: Mapping[str, float] | None = None,
) -> list[Sample]:
    return to_samples(
        groups,
        advantage=AdvantageConfig(kind=kind),
        filters=filters or FilterConfig(),
        world=ALONE,
        penalties=penalties or {},
    )


def test_a_group_becomes_samples_with_group_relative_advantages() -> None:
    samples = samples_of([scored(7, [1.0, 0.0, 0.0, 1.0])])
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
    assert samples_of([scored(0, rewards)]) == []


def test_void_trajectories_are_left_out_and_the_others_keep_their_names() -> None:
    samples = samples_of([scored(3, [None, 1.0, None, 0.0, 0.5])])
    assert [sample.id for sample in samples] == ["3/1", "3/3", "3/4"]
    assert [sample.trajectory.prompt_ids for sample in samples] == [[3, 1], [3, 3], [3, 4]]
    assert [sample.advantage for sample in samples] == [
        pytest.approx(a / (0.5 + 1e-6)) for a in (0.5, -0.5, 0.0)
    ]
    assert all(not sample.trajectory.outcome.is_void for sample in samples)


def test_a_void_member_does_not_count_as_a_reward_of_zero() -> None:
    """The survivors' advantages are those of a group in which the void one never was."""
    with_void = samples_of([scored(0, [1.0, None, 0.2, 0.0])])
    without = samples_of([scored(0, [1.0, 0.2, 0.0])])
    assert [sample.advantage for sample in with_void] == [sample.advantage for sample in without]


def test_groups_are_compared_each_for_itself() -> None:
    samples = samples_of([scored(1, [0.0, 1.0]), scored(2, [1.0, 1.0]), scored(4, [10.0, 11.0])])
    assert [sample.id for sample in samples] == ["1/0", "1/1", "4/0", "4/1"]
    assert [sample.advantage for sample in samples[:2]] == pytest.approx(
        [sample.advantage for sample in samples[2:]]
    )


def test_a_reward_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="rewards must be finite"):
        samples_of([scored(0, [math.nan, 1.0])])


def test_without_the_variance_filter_a_group_stays_with_advantage_zero() -> None:
    keep = FilterConfig(zero_variance=False)
    samples = samples_of([scored(0, [1.0, 1.0]), scored(1, [0.0, 1.0])], filters=keep)
    assert [sample.id for sample in samples] == ["0/0", "0/1", "1/0", "1/1"]
    assert [sample.advantage for sample in samples[:2]] == [0.0, 0.0]


def test_filtered_trajectories_leave_the_loss_and_stay_in_the_baseline() -> None:
    group = scored(5, [1.0, 0.0, 0.5, None])
    cut, malformed = group.group.trajectories[1:3]
    cut.outcome = Outcome.TOKEN_LIMIT
    malformed.turns[0].is_invalid = True
    everyone = {sample.id: sample.advantage for sample in samples_of([group])}
    assert list(everyone) == ["5/0", "5/1", "5/2"]
    for filters, left in (
        (FilterConfig(overlong=True), ["5/0", "5/2"]),
        (FilterConfig(void_turns=True), ["5/0", "5/1"]),
        (FilterConfig(overlong=True, void_turns=True), ["5/0"]),
    ):
        samples = samples_of([group], filters=filters)
        assert {sample.id: sample.advantage for sample in samples} == {name: everyone[name] for name in left}


def test_a_penalty_is_part_of_the_reward() -> None:
    """Rewards 1 and 1 with penalties 0.3 and 0.1 are 0.7 and 0.9: around their mean -0.1 and 0.1."""
    groups = [scored(2, [None, 1.0, 1.0])]
    assert samples_of(groups) == []
    samples = samples_of(groups, kind=AdvantageKind.dr_grpo, penalties={"2/1": 0.3, "2/2": 0.1})
    assert [sample.advantage for sample in samples] == pytest.approx([-0.1, 0.1])


def test_reinforce_pp_compares_over_groups() -> None:
    """Rewards 1, 0 | 1, 1: mean 3/4, sample variance (3 · 1/16 + 9/16) / 3 = 1/4."""
    keep = FilterConfig(zero_variance=False)
    samples = samples_of(
        [scored(0, [1.0, 0.0]), scored(1, [1.0, 1.0])], kind=AdvantageKind.reinforce_pp, filters=keep
    )
    assert [sample.advantage for sample in samples] == pytest.approx([0.5, -1.5, 0.5, 0.5], rel=1e-5)


def test_unscored_samples_are_the_survivors() -> None:
    samples = unscored_samples([scored(4, [None, 1.0, 0.0])])
    assert [(sample.id, sample.advantage) for sample in samples] == [("4/1", 0.0), ("4/2", 0.0)]
