"""Which groups a step takes: streams of questions whose episodes are known, one rank and two.

Letters: C has a signal, E and H have none, S never ends. E and H end before C does.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from integration.launch import run_checks
from integration.scripts.collect_checks import (
    CASES,
    GROUP_SIZE,
    KINDS,
    Case,
    Guesser,
    Player,
    collected,
    exact,
    rewards,
    stream,
)
from searchrl.collect import Collected, collect
from searchrl.config import ResamplingConfig
from searchrl.data import Sampler
from searchrl.preemption import Preempted, StopRequest
from searchrl.rewards import ScoredGroup
from searchrl.trajectory import Example, Finish, Group, Outcome, Trajectory, Turn


@pytest.fixture(scope="module")
def player(tokenizer: PreTrainedTokenizerFast) -> Iterator[Player]:
    playing = Player(Guesser(tokenizer))
    yield playing
    playing.runner.close()


def ids(groups: list[ScoredGroup]) -> list[int]:
    return [item.group.id for item in groups]


def counts(step: Collected) -> list[float]:
    names = ("rounds", "groups_sampled", "groups_aborted", "groups_surplus", "zero_variance_groups")
    return [step.metrics[f"rollout/{name}"] for name in names]


@pytest.mark.parametrize(
    ("case", "chosen", "left_out", "numbers"),
    [
        # One round: what is complete is taken, whether it has a signal or not.
        (Case("CHEC", 4), [0, 1, 2, 3], [], [1, 4, 0, 0, 2]),
        (Case("HHHH", 4), [0, 1, 2, 3], [], [1, 4, 0, 0, 4]),
        # Enough at once; then 4 questions, 2 are missing, 2 questions, 1 is missing, 1 question.
        (Case("CCCC", 4, max_rounds=3), [0, 1, 2, 3], [], [1, 4, 0, 0, 0]),
        (Case("CHCE CH C", 4, max_rounds=5), [0, 2, 4, 6], [1, 3, 5], [3, 7, 0, 0, 3]),
        # Not enough after the last round: some, or none.
        (Case("CHHC HH", 4, max_rounds=2), [0, 3], [1, 2, 4, 5], [2, 6, 0, 0, 4]),
        (Case("HH EE HH", 2, max_rounds=3), [], [0, 1, 2, 3, 4, 5], [3, 6, 0, 0, 6]),
        # 3 are started for 2 that are needed: the first 2 to be complete, in the order of their ids.
        (Case("SCC", 2, oversample=1.5), [1, 2], [], [1, 3, 1, 0, 0]),
        (Case("CSH", 2, oversample=1.5), [0, 2], [], [1, 3, 1, 0, 1]),
        (Case("CEH", 2, oversample=1.5), [1, 2], [], [1, 3, 1, 0, 2]),
        # With rounds, the first 2 that have a signal; what was complete before has been scored.
        (Case("CSHC", 2, max_rounds=3, oversample=2), [0, 3], [2], [1, 4, 1, 0, 1]),
        # 1 of 4; 1 is missing, 2 are started, the one without a signal does not end the round.
        (Case("HCHH EC", 2, max_rounds=3, oversample=2), [1, 5], [0, 2, 3, 4], [2, 6, 0, 0, 4]),
        (Case("HCHH CS", 2, max_rounds=3, oversample=2), [1, 4], [0, 2, 3], [2, 6, 1, 0, 3]),
    ],
)
def test_a_step_by_hand(
    player: Player, case: Case, chosen: list[int], left_out: list[int], numbers: list[float]
) -> None:
    sampler = Sampler(stream(case.kinds), seed=0)
    step = collected(case, player, sampler)
    assert (ids(step.chosen), ids(step.left_out), counts(step)) == (chosen, left_out, numbers)
    assert ids(step.scored) == sorted(chosen + left_out)
    complete = len(chosen) + len(left_out)
    assert step.metrics["rollout/informative_groups"] == (complete - numbers[-1]) / complete
    assert player.engine.running == 0
    assert sampler.state_dict()["cursor"] == numbers[1]
    letters = case.kinds.replace(" ", "")
    for item in step.scored:
        assert item.group.example.question.startswith(KINDS[letters[item.group.id]])
        assert len(item.group.trajectories) == GROUP_SIZE


def test_a_request_to_stop_ends_the_step_without_a_group(player: Player) -> None:
    stop = StopRequest()

    def play(questions: Sequence[tuple[int, Example]], is_enough: Callable[[Group], bool]) -> list[Group]:
        stop.ask(signal.SIGTERM)
        return []

    sampler = Sampler(stream("CC"), seed=0)
    with pytest.raises(Preempted):
        collect(sampler, play, exact, groups_per_step=2, resampling=ResamplingConfig(max_rounds=3), stop=stop)
    assert sampler.state_dict()["cursor"] == 2  # one round


def test_one_round_is_a_plain_rollout(player: Player) -> None:
    """Ids count through the run, step x groups_per_step + place, and fix what is sampled."""
    case = Case("CHECCCHCCECH", 4)
    sampler = Sampler(stream(case.kinds), seed=0)
    steps = [collected(case, player, sampler) for _ in range(3)]
    assert [ids(step.chosen) for step in steps] == [
        [4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3] for n in range(3)
    ]
    everything = player(Sampler(stream(case.kinds), seed=0).take(12), lambda _: False)
    assert [item.group for step in steps for item in step.chosen] == everything


@settings(deadline=None, max_examples=25)
@given(
    kinds=st.text("CHE", min_size=1, max_size=9),
    needed=st.integers(1, 4),
    rounds=st.integers(1, 3),
    oversample=st.sampled_from([1.0, 1.5, 2.0]),
)
def test_any_steps_keep_the_promises(
    player: Player, kinds: str, needed: int, rounds: int, oversample: float
) -> None:
    """Over epochs, too: ids are never used twice, nothing complete is lost, and a resumed run draws on."""
    case = Case(kinds, needed, rounds, oversample)
    sampler = Sampler(stream(kinds), seed=0)
    drawn = 0
    for _ in range(3):
        step = collected(case, player, sampler)
        played, started, aborted = step.scored, *counts(step)[1:3]
        assert all(drawn <= id_ < drawn + started for id_ in ids(played))
        assert len(set(ids(played))) == len(played) == started - aborted
        assert aborted == 0 or oversample > 1
        drawn += int(started)
        assert sampler.state_dict()["cursor"] == drawn
        varied = [item.group.id for item in played if len({r.total for _, _, r in item.survivors}) > 1]
        assert ids(step.chosen) == (ids(played) if rounds == 1 else varied)[:needed]
        assert len(step.chosen) == needed or counts(step)[0] == rounds > 1
        resumed = Sampler(stream(kinds), seed=0)
        resumed.load_state_dict(sampler.state_dict())
        sampler = resumed


def test_a_resumed_run_goes_on_as_if_it_had_not_ended(player: Player) -> None:
    case = Case("CHCECHCHHHCCCCHC", 4, max_rounds=3)
    sampler = Sampler(stream(case.kinds), seed=0)
    collected(case, player, sampler)
    resumed = Sampler(stream(case.kinds), seed=0)
    resumed.load_state_dict(sampler.state_dict())
    assert collected(case, player, resumed) == collected(case, player, sampler)


@pytest.mark.parametrize("oversample", [1.0, 2.0])
def test_every_complete_group_is_scored_once(player: Player, oversample: float) -> None:
    scored: list[int] = []

    def score(groups: Sequence[Group]) -> list[ScoredGroup]:
        scored.extend(group.id for group in groups)
        return exact(groups)

    resampling = ResamplingConfig(max_rounds=3, oversample=oversample)
    sampler = Sampler(stream("HCHHECCHHCCC"), seed=0)
    step = collect(sampler, player, score, groups_per_step=3, resampling=resampling)
    assert sorted(scored) == ids(step.scored)


def test_a_lone_survivor_is_no_signal() -> None:
    """Rewards are compared among survivors: 1 and a void say nothing, nor do 1, 1 and a void; 1 and 0 do."""
    plans: dict[int, list[str | None]] = {0: ["yes", None], 1: ["yes", "yes", None], 2: ["yes", "no", None]}

    def play(questions: Any, is_enough: Any) -> list[Group]:
        return [
            Group(id=id_, example=example, trajectories=[ended(answer) for answer in plans[id_]])
            for id_, example in questions
        ]

    def ended(answer: str | None) -> Trajectory:
        turn = Turn(token_ids=[1], logprobs=[-1.0], text="", finish=Finish.STOP, policy_version=0)
        outcome = Outcome.TOOL_FAILED if answer is None else Outcome.ANSWERED
        return Trajectory(prompt_ids=[0], turns=[turn], outcome=outcome, answer=answer)

    example = Example(id="q", question="?", golden_answers=("yes",), data_source="t")
    resampling = ResamplingConfig(max_rounds=3)
    step = collect(Sampler([example], seed=0), play, exact, groups_per_step=1, resampling=resampling)
    assert (ids(step.chosen), ids(step.left_out)) == ([2], [0, 1])


def test_a_failure_of_a_reward_ends_the_step(player: Player) -> None:
    def score(groups: Sequence[Group]) -> list[ScoredGroup]:
        raise ZeroDivisionError(groups[0].example.id)

    sampler = Sampler(stream("CC"), seed=0)
    with pytest.raises(ZeroDivisionError):
        collect(sampler, player, score, groups_per_step=2, resampling=ResamplingConfig())
    with pytest.raises(ExceptionGroup) as caught:  # while episodes run
        collect(sampler, player, score, groups_per_step=1, resampling=ResamplingConfig(oversample=2.0))
    assert caught.group_contains(ZeroDivisionError)
    assert player.engine.running == 0


# --- two ranks --------------------------------------------------------------------------------------------

BY_HAND: dict[str, list[tuple[list[int], list[int], list[float]]]] = {
    "one round": [([0, 1, 2, 3], [], [1, 4, 0, 0, 2]), ([4, 5, 6, 7], [], [1, 4, 0, 0, 2])],
    # 4 questions, 2 are missing; 2 questions, 1 is missing; 2, so that each rank has one, and 1 is too many.
    "rounds": [
        ([0, 1, 4, 6], [2, 3, 5, 7], [3, 8, 0, 1, 3]),
        ([10, 11, 12, 13], [8, 9], [2, 6, 0, 0, 2]),
    ],
    "in vain": [
        ([], [0, 1, 2, 3, 4, 5, 6, 7], [2, 8, 0, 0, 8]),
        ([12], [8, 9, 10, 11, 13, 14, 15], [2, 8, 0, 0, 7]),
    ],
    # Each rank starts 3 and stops at 2.
    "oversampled": [([0, 2, 3, 4], [], [1, 6, 2, 0, 1]), ([7, 8, 9, 11], [], [1, 6, 2, 0, 1])],
    # Rank 0 has its share, rank 1 nothing: each starts 2 more and stops at 1.
    "oversampled rounds": [
        ([0, 2, 6, 8], [3, 4, 5, 9], [2, 10, 2, 0, 4]),
        ([10, 11, 13, 15], [], [1, 6, 2, 0, 0]),
    ],
}


@pytest.mark.integration
def test_two_ranks_agree(tiny_model: Path, tmp_path: Path, player: Player) -> None:
    results = run_checks("collect_checks", tmp_path, tiny_model, ranks=2).results
    assert set(results) == set(CASES) == set(BY_HAND)
    for name, case in CASES.items():
        ranks = results[name]
        assert ranks[0]["sampler"] == ranks[1]["sampler"]
        assert ranks[0]["agreed"]
        assert ranks[1]["agreed"]
        for number, (chosen, left_out, numbers) in enumerate(BY_HAND[name]):
            (mine, mine_left, metrics), (other, other_left, other_metrics) = (
                rank["steps"][number] for rank in ranks
            )
            assert metrics == other_metrics
            assert list(metrics.values())[: len(numbers)] == numbers
            assert sorted(map(int, mine | other)) == chosen
            assert sorted(map(int, mine_left | other_left)) == left_out
        if name in ("one round", "in vain"):  # where ranks have nothing to round up, they change nothing
            sampler = Sampler(stream(case.kinds), seed=0)
            for number in range(2):
                alone = collected(case, player, sampler)
                (mine, mine_left, metrics), (other, other_left, _) = (rank["steps"][number] for rank in ranks)
                assert rewards(alone.chosen) == mine | other
                assert rewards(alone.left_out) == mine_left | other_left
                assert alone.metrics == metrics
