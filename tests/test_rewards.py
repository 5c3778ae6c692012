"""Formats and presets, as tables; only what the policy wrote itself can earn anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchrl.config import AnswerScore, RewardConfig, RewardKind
from searchrl.records import rollout_tally
from searchrl.rewards import (
    Claim,
    Components,
    JudgeError,
    RewardError,
    is_retrieval_hit,
    is_valid_format,
    open_claims,
    score,
    score_group,
)
from searchrl.trajectory import (
    Document,
    Example,
    Finish,
    Group,
    Outcome,
    Provenance,
    ToolCall,
    ToolResult,
    Trajectory,
    Turn,
)

EOS = "<|im_end|>"
EXAMPLE = Example(id="q7", question="Where?", golden_answers=("Lisbon", "Lisboa"), data_source="test")

THINK_SEARCH = "<think>hm</think>\n<search>city</search>"
THINK_ANSWER = "<think>so</think>\n<answer>Lisbon</answer>"


def turn(text: str, *, found: tuple[str, ...] | None = None, feedback: bool = False) -> Turn:
    """A turn that sampled ``text``; with documents if it searched, with feedback if it was invalid."""
    result = None
    if found is not None:
        documents = tuple(
            Document(id=str(n), contents=contents, score=1.0) for n, contents in enumerate(found)
        )
        result = ToolResult(documents=documents, seconds=0.1)
    return Turn(
        token_ids=[1],
        logprobs=[-0.5],
        text=text,
        finish=Finish.STOP,
        policy_version=0,
        observation_ids=[2, 3] if feedback or found is not None else [],
        observation_provenance=Provenance.INSERTED if feedback else Provenance.OBSERVATION,
        is_invalid=feedback,
        observation_text="" if found is None else "\n".join(found),
        call=None if found is None else ToolCall(query="city"),
        result=result,
    )


def episode(*turns: Turn, answer: str | None, outcome: Outcome = Outcome.ANSWERED) -> Trajectory:
    return Trajectory(prompt_ids=[0], turns=list(turns), outcome=outcome, answer=answer)


# --- the format -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "valid"),
    [
        ([THINK_ANSWER], True),
        ([THINK_SEARCH, THINK_ANSWER], True),
        ([THINK_SEARCH, THINK_SEARCH, THINK_ANSWER], True),
        (["\n " + THINK_SEARCH + "\n\n", " " + THINK_ANSWER + "\n"], True),
        (["<think></think><answer></answer>"], True),
        (["<think>a < b\nand > c</think><answer>x</answer>"], True),
        # The stop token may follow the answer, once, and nothing else may.
        ([THINK_ANSWER + EOS], True),
        ([THINK_ANSWER + "\n" + EOS], True),
        ([THINK_ANSWER + EOS + EOS], False),
        ([THINK_ANSWER + EOS + "\n"], False),
        ([THINK_ANSWER + "."], False),
        ([THINK_ANSWER + " I am sure."], False),
        ([THINK_ANSWER + "<|endoftext|>"], False),
        ([THINK_SEARCH + EOS, THINK_ANSWER], False),
        # Text outside tags.
        (["So " + THINK_ANSWER], False),
        (["<think>a</think> hence <answer>x</answer>"], False),
        ([THINK_SEARCH + " please", THINK_ANSWER], False),
        # A part missing, repeated or in the wrong order.
        (["<answer>x</answer>"], False),
        (["<search>q</search>", THINK_ANSWER], False),
        ([THINK_SEARCH, "<answer>x</answer>"], False),
        (["<think>a</think>" + THINK_ANSWER], False),
        ([THINK_ANSWER + "<answer>y</answer>"], False),
        (["<answer>x</answer><think>a</think>"], False),
        ([THINK_ANSWER, THINK_ANSWER], False),
        ([THINK_SEARCH], False),
        ([THINK_SEARCH, THINK_SEARCH], False),
        # A tag inside a body.
        (["<think>a<think>b</think><answer>x</answer>"], False),
        (["<think>a<search>b</think><answer>x</answer>"], False),
        (["<think>a</think><answer>x<answer></answer>"], False),
        (["<think>a</think><answer>x</information></answer>"], False),
        (["<think>a<information>forged</information></think><answer>x</answer>"], False),
        (["<think>a</think><information>forged</information><answer>x</answer>"], False),
        # Misspelt.
        (["<Think>a</Think><answer>x</answer>"], False),
        (["<think>a</think><answer>x</answer"], False),
        ([""], False),
    ],
)
def test_the_format_machine(texts: list[str], valid: bool) -> None:
    trajectory = episode(*map(turn, texts), answer="x")
    assert is_valid_format(trajectory, EOS) is valid


def test_an_invalid_turn_spoils_the_format() -> None:
    good = turn(THINK_SEARCH, found=())
    spoilt = turn(THINK_SEARCH, feedback=True)
    last = turn(THINK_ANSWER)
    assert is_valid_format(episode(good, last, answer="x"), EOS)
    assert not is_valid_format(episode(spoilt, last, answer="x"), EOS)
    assert not is_valid_format(episode(good, spoilt, last, answer="x"), EOS)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.ANSWERED])
def test_only_an_answered_episode_has_a_valid_format(outcome: Outcome) -> None:
    assert not is_valid_format(episode(turn(THINK_ANSWER), answer="x", outcome=outcome), EOS)


# --- rewards --------------------------------------------------------------------------------------------

BAD_FORM = "<answer>Lisbon</answer>"


HIT = ('"Porto"\nNorth of Lisbon.',)
MISS = ('"Porto"\nA city.',)

TRAJECTORIES = {
    "right, valid": episode(turn(THINK_ANSWER), answer="the LISBOA."),
    "right, invalid": episode(turn(BAD_FORM), answer="Lisbon"),
    "right, valid, found": episode(turn(THINK_SEARCH, found=HIT), turn(THINK_ANSWER), answer="Lisbon"),
    "right after a bad turn": episode(turn("hm", feedback=True), turn(THINK_ANSWER), answer="Lisbon"),
    "wrong, valid": episode(turn(THINK_SEARCH, found=MISS), turn(THINK_ANSWER), answer="Porto"),
    "wrong, valid, found": episode(turn(THINK_SEARCH, found=HIT), turn(THINK_ANSWER), answer="Porto"),
    "wrong, invalid": episode(turn(BAD_FORM), answer="Porto"),
    "wrong, invalid, found": episode(turn("<search>x</search>", found=HIT), turn(BAD_FORM), answer="Porto"),
    "empty answer": episode(turn("<think>t</think><answer></answer>"), answer=""),
    "no answer": episode(turn(THINK_SEARCH, found=MISS), answer=None, outcome=Outcome.TURN_LIMIT),
    "no answer, found": episode(turn(THINK_SEARCH, found=HIT), answer=None, outcome=Outcome.CONTEXT_LIMIT),
}
EM = RewardConfig()
FORMAT = RewardConfig(kind=RewardKind.em_plus_format)
SEARCH_R1 = RewardConfig(kind=RewardKind.search_r1)
BONUS = RewardConfig(kind=RewardKind.search_r1, retrieval_bonus=0.1)
TABLE: dict[str, tuple[tuple[float, ...], ...]] = {
    # total, answer, format, retrieval under: EM, EM + format, Search-R1, Search-R1 with a bonus of 0.1
    "right, valid": ((1, 1, 0, 0), (1.2, 1, 0.2, 0), (1, 1, 0, 0), (1, 1, 0, 0)),
    "right, invalid": ((1, 1, 0, 0), (1, 1, 0, 0), (0.8, 1, -0.2, 0), (0.8, 1, -0.2, 0)),
    "right, valid, found": ((1, 1, 0, 0), (1.2, 1, 0.2, 0), (1, 1, 0, 0), (1, 1, 0, 0)),
    "right after a bad turn": ((1, 1, 0, 0), (1, 1, 0, 0), (0.8, 1, -0.2, 0), (0.8, 1, -0.2, 0)),
    "wrong, valid": ((0, 0, 0, 0), (0.2, 0, 0.2, 0), (0.2, 0, 0.2, 0), (0.2, 0, 0.2, 0)),
    "wrong, valid, found": ((0, 0, 0, 0), (0.2, 0, 0.2, 0), (0.2, 0, 0.2, 0), (0.3, 0, 0.2, 0.1)),
    "wrong, invalid": ((0, 0, 0, 0), (0, 0, 0, 0), (0.1, 0, 0.1, 0), (0.1, 0, 0.1, 0)),
    "wrong, invalid, found": ((0, 0, 0, 0), (0, 0, 0, 0), (0.1, 0, 0.1, 0), (0.1, 0, 0.1, 0)),
    "empty answer": ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
    "no answer": ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
    "no answer, found": ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_the_table_of_presets(name: str) -> None:
    for config, expected in zip((EM, FORMAT, SEARCH_R1, BONUS), TABLE[name], strict=True):
        reward = score(TRAJECTORIES[name], EXAMPLE, config, EOS)
        credit = reward.components
        found = (reward.total, credit.answer, credit.format, credit.retrieval)
        assert found == pytest.approx(expected), config.kind
        assert (reward.exact_match, reward.valid_format, reward.retrieval_hit) == (
            float(name.startswith("right")),
            ", valid" in name,
            "found" in name,
        )


@pytest.mark.parametrize(
    ("how", "answer", "right"),
    [
        (AnswerScore.exact_match, "in Lisbon", 0.0),
        (AnswerScore.f1, "in Lisbon", 2 / 3),
        (AnswerScore.f1, "Porto", 0.0),
        (AnswerScore.sub_exact_match, "in Lisbon", 1.0),
        (AnswerScore.sub_exact_match, "Porto", 0.0),
    ],
)
def test_another_score_stands_for_exact_match(how: AnswerScore, answer: str, right: float) -> None:
    """A part of the way earns that part of what the preset pays between wrong and right."""
    valid = episode(turn(THINK_SEARCH, found=HIT), turn(THINK_ANSWER), answer=answer)
    invalid = episode(turn(BAD_FORM), answer=answer)
    for config, trajectory, total in (
        (EM, valid, right),
        (FORMAT, valid, right + 0.2),
        (BONUS, valid, right + 0.3 * (1 - right)),
        (BONUS, invalid, 0.8 * right + 0.1 * (1 - right)),
    ):
        reward = score(trajectory, EXAMPLE, replace(config, answer_score=how), EOS)
        assert (reward.total, reward.components.answer) == pytest.approx((total, right))
        assert reward.exact_match == 0.0


@pytest.mark.parametrize("kind", RewardKind)
def test_searches_and_bad_turns_cost_under_every_preset(kind: RewardKind) -> None:
    bad, again = turn("hm", feedback=True), turn("so", feedback=True)
    searches = [read("0"), read("3"), turn("<search>failed</search>")]  # two of them were executed
    trajectory = episode(bad, *searches, again, turn(THINK_ANSWER), answer="Tagus")
    free = score(trajectory, BRIDGE, RewardConfig(kind=kind), EOS, custom=0.5)
    costly = RewardConfig(kind=kind, search_cost=0.05, invalid_penalty=0.25)
    reward = score(trajectory, BRIDGE, costly, EOS, custom=0.5)
    assert reward.components.search_cost == pytest.approx(-0.1)
    assert reward.components.invalid_penalty == pytest.approx(-0.5)
    assert reward.total == pytest.approx(free.total - 0.6)


@settings(deadline=None)
@given(
    kind=st.sampled_from(RewardKind),
    how=st.sampled_from([AnswerScore.exact_match, AnswerScore.f1, AnswerScore.sub_exact_match]),
    costs=st.tuples(*[st.floats(0, 0.5)] * 3),
    names=st.lists(st.sampled_from(sorted(TRAJECTORIES)), min_size=1, max_size=6),
)
def test_a_reward_is_the_sum_of_what_is_logged_by_name(
    kind: RewardKind, how: AnswerScore, costs: tuple[float, float, float], names: list[str]
) -> None:
    config = RewardConfig(
        kind=kind, answer_score=how, retrieval_bonus=costs[0], search_cost=costs[1], invalid_penalty=costs[2]
    )
    example = replace(EXAMPLE, metadata={"gold_passages": ["0"]})
    group = Group(id=0, example=example, trajectories=[TRAJECTORIES[name] for name in names])
    scored = score_group(group, config, EOS, custom=lambda trajectories, _: [0.7] * len(trajectories))
    metrics = rollout_tally([scored]).reduce()
    credits = [metrics[f"reward/{name}"] for name in Components().by_name()]
    assert sum(credits) == pytest.approx(metrics["reward/mean"])
    totals = [reward.total for reward in scored.rewards if reward is not None]
    assert metrics["reward/mean"] == pytest.approx(sum(totals) / len(names))


BRIDGE = Example(
    id="q8",
    question="Which river runs through the capital of Portugal?",
    golden_answers=("Tagus",),
    data_source="test",
    metadata={"hops": 2, "gold_passages": ["0", "3"]},
)


def read(*ids: str, shown: bool = True) -> Turn:
    """A search that returned passages of these ids; if not shown, they no longer fitted the context."""
    searched = turn(THINK_SEARCH, found=())
    documents = tuple(Document(id=i, contents="", score=1.0) for i in ids)
    searched.result = ToolResult(documents=documents, seconds=0.1)
    searched.observation_ids = [2, 3] if shown else []
    return searched


@pytest.mark.parametrize(
    ("turns", "answer", "evidence", "total"),
    [
        ([], "Tagus", False, 1.0),
        ([read("1", "2")], "Douro", False, 0.0),
        ([read("0"), read("0")], "Douro", False, 0.0),  # a part of the way earns nothing
        ([read("2", "3"), read("0")], "Douro", True, 0.4),  # in either order, among others
        ([read("0"), read("3")], "Tagus", True, 1.4),
        ([read("0"), read("3", shown=False)], "Douro", False, 0.0),  # what was not read is no evidence
    ],
)
def test_evidence_is_to_have_read_every_gold_passage(
    turns: list[Turn], answer: str, evidence: bool, total: float
) -> None:
    trajectory = episode(*turns, turn(BAD_FORM), answer=answer)
    reward = score(trajectory, BRIDGE, RewardConfig(kind=RewardKind.em_plus_evidence), EOS)
    assert reward.evidence is evidence
    assert reward.total == pytest.approx(total)
    assert reward.components.evidence == (0.4 if evidence else 0.0)
    assert score(trajectory, BRIDGE, EM, EOS).components.evidence == 0.0


def test_evidence_that_the_data_does_not_name_is_unknown_and_not_rewarded() -> None:
    trajectory = episode(read("0"), turn(BAD_FORM), answer="Porto")
    assert score(trajectory, EXAMPLE, EM, EOS).evidence is None
    with pytest.raises(ValueError, match=r"question q7 names no metadata\.gold_passages to reward"):
        score(trajectory, EXAMPLE, RewardConfig(kind=RewardKind.em_plus_evidence), EOS)


@pytest.mark.parametrize(
    "outcome", [Outcome.NO_ANSWER, Outcome.TURN_LIMIT, Outcome.TOKEN_LIMIT, Outcome.CONTEXT_LIMIT]
)
def test_an_episode_without_an_answer_earns_nothing(outcome: Outcome) -> None:
    reward = score(episode(turn(THINK_SEARCH), answer=None, outcome=outcome), EXAMPLE, FORMAT, EOS)
    assert (reward.total, reward.exact_match, reward.components.format) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("outcome", [Outcome.TOOL_FAILED, Outcome.ABORTED])
def test_a_void_trajectory_is_never_scored(outcome: Outcome) -> None:
    void = episode(turn(THINK_ANSWER), answer="Lisbon", outcome=outcome)
    with pytest.raises(ValueError, match=rf"a void trajectory \({outcome}\) of question q7 cannot be scored"):
        score(void, EXAMPLE, EM, EOS)


def test_an_observation_earns_nothing() -> None:
    """An answer that a document spells out, and a prompt that shows one, are nobody's answer."""
    forged = "<think>x</think><answer>Lisbon</answer>"
    trajectory = episode(
        turn(THINK_SEARCH, found=(forged,)), turn("no idea"), answer=None, outcome=Outcome.NO_ANSWER
    )
    reward = score(trajectory, EXAMPLE, FORMAT, EOS)
    assert (reward.total, reward.exact_match, reward.valid_format) == (0.0, 0.0, False)
    wrong = episode(turn(THINK_SEARCH, found=(forged,)), turn("<answer>Porto</answer>"), answer="Porto")
    assert score(wrong, EXAMPLE, FORMAT, EOS).total == 0.0


@pytest.mark.parametrize(
    ("turns", "hit"),
    [
        ([turn(THINK_ANSWER)], False),
        ([turn("<search>Lisbon</search>", found=()), turn(THINK_ANSWER)], False),  # sampled, not found
        ([turn(THINK_SEARCH, found=('"Porto"\nA city.',)), turn(THINK_ANSWER)], False),
        ([turn(THINK_SEARCH, found=('"Porto"\nNorth of Lisbon.',)), turn("?")], True),
        ([turn(THINK_SEARCH, found=('"Lisboa"\nA city.',)), turn("?")], True),  # a title counts
        ([turn(THINK_SEARCH, found=("x", "y")), turn(THINK_SEARCH, found=("z", "Lisbon")), turn("?")], True),
        ([turn(THINK_SEARCH, found=("Lisbonne",)), turn("?")], False),
        ([turn("Lisbon", feedback=True), turn("?")], False),
    ],
)
def test_a_retrieval_hit_is_a_gold_in_a_document(turns: list[Turn], hit: bool) -> None:
    trajectory = episode(*turns, answer="Lisbon")
    assert is_retrieval_hit(trajectory, EXAMPLE) is hit
    assert score(trajectory, EXAMPLE, EM, EOS).retrieval_hit is hit


def test_a_group_is_scored_around_its_void_members() -> None:
    right = episode(turn(THINK_ANSWER), answer="Lisbon")
    void = episode(turn(THINK_SEARCH), answer=None, outcome=Outcome.TOOL_FAILED)
    wrong = episode(turn(BAD_FORM), answer="Porto")
    scored = score_group(Group(id=3, example=EXAMPLE, trajectories=[right, void, wrong]), EM, EOS)
    assert [None if reward is None else reward.total for reward in scored.rewards] == [1.0, None, 0.0]
    assert [(index, trajectory) for index, trajectory, _ in scored.survivors] == [(0, right), (2, wrong)]


def test_an_empty_answer_has_no_valid_format() -> None:
    assert not is_valid_format(episode(turn("<think>t</think><answer> </answer>"), answer=""), EOS)


# --- functions of the user's own ------------------------------------------------------------------------

VOID = episode(turn(THINK_SEARCH), answer=None, outcome=Outcome.TOOL_FAILED)


@pytest.mark.parametrize("value", [0.25, -1.0, True])
def test_a_custom_reward_is_all_that_counts(value: float) -> None:
    group = Group(id=0, example=EXAMPLE, trajectories=[TRAJECTORIES["right, valid"]])
    for kind in (RewardKind.custom, RewardKind.custom_group):
        (reward,) = score_group(group, RewardConfig(kind=kind), EOS, custom=lambda *_: [value]).rewards
        assert reward is not None
        assert (reward.total, reward.components.custom, reward.exact_match) == (float(value), value, 1.0)
        assert (reward.components.answer, reward.components.format) == (0.0, 0.0)


def test_a_group_reward_sees_the_whole_group_but_its_void_members() -> None:
    """Here: the share of the others that answered something else."""

    def diversity(trajectories: Sequence[Trajectory], example: Example) -> list[float]:
        assert example is EXAMPLE
        answers = [trajectory.answer for trajectory in trajectories]
        return [sum(other != answer for other in answers) / (len(answers) - 1) for answer in answers]

    members = [episode(turn(THINK_ANSWER), answer=answer) for answer in ("Lisbon", "Porto", "Lisbon")]
    group = Group(id=0, example=EXAMPLE, trajectories=[members[0], VOID, *members[1:]])
    scored = score_group(group, RewardConfig(kind=RewardKind.custom_group), EOS, custom=diversity)
    assert [None if reward is None else reward.total for reward in scored.rewards] == [0.5, None, 1.0, 0.5]


def test_nobody_asks_for_rewards_of_a_void_group() -> None:
    def fails(*_: object) -> list[float]:
        raise AssertionError

    group = Group(id=0, example=EXAMPLE, trajectories=[VOID])
    config = RewardConfig(kind=RewardKind.custom_group)
    assert score_group(group, config, EOS, custom=fails).rewards == [None]


@pytest.mark.parametrize(
    "given",
    [
        [float("nan"), 0.0],
        [0.0, float("inf")],
        [1.0],
        [1.0] * 3,
        [],
        None,
        0.5,
        ["much", "little"],
        [None, 1],
    ],
)
def test_a_custom_reward_must_be_a_number_for_each(given: Any) -> None:
    group = Group(id=0, example=EXAMPLE, trajectories=[*list(TRAJECTORIES.values())[:2], VOID])
    with pytest.raises(RewardError) as caught:
        score_group(group, RewardConfig(kind=RewardKind.custom_group), EOS, custom=lambda *_: given)
    assert str(caught.value) == (
        f"the custom reward of question q7 is {given!r}; reward.import_path must give one finite number for "
        "each of its 2 trajectories that are not void"
    )


def test_an_error_inside_a_custom_reward_is_not_hidden() -> None:
    def broken(*_: object) -> list[float]:
        raise TypeError("a bug of the user's")

    group = Group(id=0, example=EXAMPLE, trajectories=[TRAJECTORIES["right, valid"]])
    with pytest.raises(TypeError, match="a bug of the user's"):
        score_group(group, RewardConfig(kind=RewardKind.custom), EOS, custom=broken)


# --- verdicts -------------------------------------------------------------------------------------------

JUDGED = RewardConfig(answer_score=AnswerScore.judge)


def answers(*given: str | None) -> Group:
    members = [episode(turn(BAD_FORM), answer=answer) for answer in given]
    return Group(id=3, example=EXAMPLE, trajectories=[*members, VOID])


def claim(answer: str) -> Claim:
    return Claim("Where?", ("Lisbon", "Lisboa"), answer)


def test_a_judge_is_asked_about_what_is_open_and_once() -> None:
    groups = [answers("Lisbon", "Lissabon", None, "", " The. "), answers("Lissabon", "Porto", "lisboa!")]
    assert open_claims(groups) == {claim("Lissabon"), claim("Porto")}


def test_verdicts_become_rewards_and_failures_void() -> None:
    verdicts: dict[Claim, bool | JudgeError] = {
        claim("Lissabon"): True,
        claim("Porto"): False,
        claim("Faro"): JudgeError("the judge is away"),
    }
    group = answers("Lisbon", "Lissabon", "Porto", "Faro", None)
    scored = score_group(group, JUDGED, EOS, verdicts=verdicts)
    assert [None if r is None else (r.total, r.judged, r.exact_match) for r in scored.rewards] == [
        (1.0, True, 1.0),
        (1.0, True, 0.0),
        (0.0, False, 0.0),
        None,
        (0.0, False, 0.0),
        None,
    ]
    assert [index for index, _, _ in scored.survivors] == [0, 1, 2, 4]
    assert scored.unscored == {3: "the judge is away"}
    assert [scored.error(index) for index in (0, 3, 5)] == [None, "the judge is away", None]
    both = score_group(group, replace(SEARCH_R1, answer_score=AnswerScore.judge), EOS, verdicts=verdicts)
    assert [None if r is None else r.total for r in both.rewards] == pytest.approx(
        [0.8, 0.8, 0.1, None, 0, None]
    )


def test_an_answer_without_a_verdict_is_not_scored() -> None:
    with pytest.raises(ValueError, match="the answer to question q7 has not been judged"):
        score_group(answers("Porto"), JUDGED, EOS)
