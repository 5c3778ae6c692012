"""What a rollout amounts to: PROTOCOL §5's metrics on groups made by hand, and the trajectory log."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from searchrl.algorithm.importance import ImportanceInputs
from searchrl.config import RewardConfig, RewardKind
from searchrl.records import (
    SHOWN,
    drop_later,
    policy_lag,
    rollout_tally,
    transcripts,
    write_trainer_logprobs,
    write_trajectories,
)
from searchrl.rewards import ScoredGroup, score_group
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
THINK = "<think>hm</think>"
GOLD = Document(id="d1", contents='"Rome"\nIt lies on the Tiber.', score=2.123456)
OTHER = Document(id="d2", contents='"Nile"\nA river.', score=1.0)


def searched(sampled: int, observed: int, *documents: Document, truncated: bool = False) -> Turn:
    return Turn(
        token_ids=[5] * sampled,
        logprobs=[-0.123456] * sampled,
        text=f"{THINK}<search>rome</search>",
        finish=Finish.STOP,
        policy_version=4,
        observation_ids=[6] * observed,
        observation_text="<information>…</information>",
        call=ToolCall(query="rome", truncated=truncated),
        result=ToolResult(documents=documents, seconds=0.25),
    )


def babbled(sampled: int, inserted: int) -> Turn:
    return Turn(
        token_ids=[7] * sampled,
        logprobs=[-1.0] * sampled,
        text="hm",
        finish=Finish.EOS,
        policy_version=4,
        observation_ids=[8] * inserted,
        observation_provenance=Provenance.INSERTED,
        is_invalid=True,
        observation_text="That was no action.",
    )


def answered(sampled: int, *, think: bool) -> Turn:
    return Turn(
        token_ids=[9] * sampled,
        logprobs=[-2.0] * sampled,
        text=(THINK if think else "") + "<answer>…</answer>",
        finish=Finish.STOP,
        policy_version=4,
    )


def ended(*turns: Turn, answer: str | None, outcome: Outcome = Outcome.ANSWERED) -> Trajectory:
    error = "no connection" if outcome.is_void else None
    return Trajectory(prompt_ids=[0] * 10, turns=list(turns), outcome=outcome, answer=answer, error=error)


def groups() -> list[ScoredGroup]:
    """Five trajectories over two questions: the numbers of every metric can be counted on one's fingers."""
    one_hop = Example(
        id="a", question="Río?", golden_answers=("Tiber",), data_source="t", metadata={"hops": 1}
    )
    two_hop = Example(
        id="b",
        question="Sea?",
        golden_answers=("Tyrrhenian",),
        data_source="t",
        metadata={"hops": 2, "gold_passages": ["d1"]},
    )
    first = [
        # right, valid: 2 turns, 1 search that shows the gold; 3 + 4 sampled, 13 observed
        ended(searched(3, 13, OTHER, GOLD), answered(4, think=True), answer="the Tiber"),
        # right, invalid: 1 turn; 2 sampled
        ended(answered(2, think=False), answer="Tiber"),
        # wrong: 3 turns, one invalid, 1 search that shows nothing; 1 + 5 + 2 sampled, 6 inserted, 7 observed
        ended(babbled(1, 6), searched(5, 7, truncated=True), answered(2, think=True), answer="Nile"),
    ]
    second = [
        # void, and counted in nothing but the outcomes
        ended(searched(100, 0), answer=None, outcome=Outcome.TOOL_FAILED),
        # no answer: 2 turns, 2 searches; the gold of the other question is no hit; 2 + 3 sampled, 20 observed
        ended(searched(2, 20, GOLD), searched(3, 0, OTHER), answer=None, outcome=Outcome.CONTEXT_LIMIT),
    ]
    return [
        score_group(
            Group(id=4, example=one_hop, trajectories=first),
            RewardConfig(kind=RewardKind.em_plus_format),
            EOS,
        ),
        score_group(
            Group(id=5, example=two_hop, trajectories=second),
            RewardConfig(kind=RewardKind.em_plus_format),
            EOS,
        ),
    ]


RESPONSES = (3 + 13 + 4) + 2 + (1 + 6 + 5 + 7 + 2) + (2 + 20 + 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("search_r1/turns_per_sample", (2 + 1 + 3 + 2) / 4),
        ("search_r1/search_calls_per_sample", (1 + 0 + 1 + 2) / 4),
        ("search_r1/search_calls_1_hop", 2 / 3),
        ("search_r1/search_calls_2_hop", 2.0),
        ("reward/mean", (1.2 + 1.0 + 0 + 0) / 4),
        ("reward/exact_match", 2 / 4),
        ("reward/exact_match_1_hop", 2 / 3),
        ("reward/exact_match_2_hop", 0.0),
        ("reward/answer", 2 / 4),
        ("reward/format", 0.2 / 4),  # credit …
        ("reward/valid_format", 1 / 4),  # … and rate are two metrics
        ("loss_mask/observation_fraction", (13 + 7 + 20) / RESPONSES),  # inserted tokens are no observation
        ("rollout/response_tokens", RESPONSES / 4),
        ("rollout/sampled_tokens", (7 + 2 + 8 + 5) / 4),
        ("rollout/invalid_turns", 1 / 8),
        ("rollout/queries_cut", 1 / 4),
        ("filter/overlong", 1 / 4),  # of survivors: the one that ran out of context
        ("filter/void_turns", 1 / 4),  # the one that babbled
        ("rollout/void", 1 / 5),
        ("rollout/outcome/answered", 3 / 5),
        ("rollout/outcome/tool_failed", 1 / 5),
        ("rollout/outcome/context_limit", 1 / 5),
        ("rollout/outcome/no_answer", 0.0),
        ("reward/evidence", 0.0),  # the preset pays for none
        ("retrieval/hit", 1 / 4),
        ("retrieval/evidence", 1.0),  # over the one trajectory whose question names its passages
        ("retrieval/recall_at_k", 1 / 4),
        ("collapse/logprob_correct", (3 * -0.123456 + 4 * -2 + 2 * -2) / (7 + 2)),  # per sampled token
        ("collapse/logprob_wrong", (-1 + 5 * -0.123456 + 2 * -2 + 5 * -0.123456) / (8 + 5)),
        ("collapse/think_words", (2 + 0 + 2 + 2) / 4),
        ("collapse/repetition", 0.0),
        ("collapse/malformed_answer", 0.0),
        ("collapse/unanswered", 1 / 4),
    ],
)
def test_metrics_by_hand(name: str, value: float) -> None:
    assert rollout_tally(groups()).reduce()[name] == pytest.approx(value)


def test_the_policy_lag_is_over_all_sampled_tokens_void_ones_included() -> None:
    scored = groups()
    for trajectory in scored[1].group.trajectories:
        for turn in trajectory.turns:
            turn.policy_version = 6
    assert policy_lag(scored, version=7) == (3 * (7 + 2 + 8) + 1 * (100 + 5), 7 + 2 + 8 + 100 + 5)
    assert policy_lag([], version=7) == (0, 0)


@pytest.mark.parametrize("outcome", Outcome)
def test_what_was_cut_is_overlong_and_nothing_else(outcome: Outcome) -> None:
    trajectory = ended(searched(3, 2), answered(4, think=True), answer=None, outcome=outcome)
    assert trajectory.is_overlong == (outcome.value in ("token_limit", "context_limit"))
    assert not trajectory.has_void_turn
    trajectory.turns.insert(0, babbled(1, 2))  # anywhere, also before turns that are fine
    assert trajectory.has_void_turn


def test_every_outcome_has_its_share() -> None:
    metrics = rollout_tally(groups()).reduce()
    shares = {name: value for name, value in metrics.items() if name.startswith("rollout/outcome/")}
    assert set(shares) == {f"rollout/outcome/{outcome.value}" for outcome in Outcome}
    assert sum(shares.values()) == pytest.approx(1.0)


def test_a_rollout_of_void_trajectories_has_outcomes_and_no_rewards() -> None:
    group = groups()[1].group
    del group.trajectories[1]
    metrics = rollout_tally([score_group(group, RewardConfig(), EOS)]).reduce()
    assert metrics["rollout/void"] == 1.0
    assert all(name.startswith("rollout/") for name in metrics)
    assert rollout_tally([]).reduce() == {}


def test_the_log_has_a_readable_line_per_trajectory(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "step-000001.jsonl"
    write_trajectories(path, groups())
    text = path.read_text(encoding="utf-8")
    assert "Río?" in text  # not \\u00ed
    records = [json.loads(line) for line in text.splitlines()]
    assert [record["id"] for record in records] == ["4/0", "4/1", "4/2", "5/0", "5/1"]
    first = records[0]
    assert {key: first[key] for key in first if key != "turns"} == {
        "id": "4/0",
        "question_id": "a",
        "question": "Río?",
        "golden_answers": ["Tiber"],
        "hops": 1,
        "outcome": "answered",
        "answer": "the Tiber",
        "error": None,
        "reward": 1.2,
        "components": {
            "answer": 1.0,
            "format": 0.2,
            "evidence": 0.0,
            "retrieval": 0.0,
            "custom": 0.0,
            "search_cost": 0.0,
            "invalid_penalty": 0.0,
        },
        "exact_match": 1.0,
        "judged": None,
        "valid_format": True,
        "retrieval_hit": True,
        "evidence": None,
        "provenance": [["prompt", 10], ["sampled", 3], ["observation", 13], ["sampled", 4]],
        "prompt_ids": [0] * 10,
    }
    assert first["turns"][0] == {
        "sampled": f"{THINK}<search>rome</search>",
        "finish": "stop",
        "policy_version": 4,
        "token_ids": [5, 5, 5],
        "logprobs": [-0.1235, -0.1235, -0.1235],
        "query": "rome",
        "search": "ok",
        "documents": [
            {"id": "d2", "title": "Nile", "score": 1.0},
            {"id": "d1", "title": "Rome", "score": 2.1235},
        ],
        "search_seconds": 0.25,
        "appended": "<information>…</information>",
        "appended_by": "observation",
    }
    assert records[4]["evidence"] is True
    last = first["turns"][1]
    assert (last["query"], last["documents"], last["search_seconds"], last["appended_by"]) == (
        None,
        [],
        None,
        None,
    )


def test_a_sample_is_the_first_trajectories_side_by_side() -> None:
    shown = transcripts(groups())
    assert [(one.question, one.outcome, one.reward, one.searches) for one in shown] == [
        ("Río?", "answered", pytest.approx(1.2), 1),
        ("Río?", "answered", 1.0, 0),
        ("Río?", "answered", 0.0, 1),
        ("Sea?", "tool_failed", None, 1),
        ("Sea?", "context_limit", 0.0, 2),
    ]
    assert (shown[0].answer, shown[0].gold, shown[3].answer) == ("the Tiber", "Tiber", "")
    assert shown[0].transcript == (
        f"{THINK}<search>rome</search><information>…</information>{THINK}<answer>…</answer>"
    )
    assert transcripts(groups() * 9) == transcripts(groups() * 4)[:SHOWN]


def test_the_log_tells_feedback_from_observations_and_failures_from_zeros(tmp_path: Path) -> None:
    write_trajectories(tmp_path / "log.jsonl", groups())
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [turn["appended_by"] for turn in records[2]["turns"]] == ["inserted", "observation", None]
    assert ["inserted", 6] in records[2]["provenance"]
    void = records[3]
    assert (void["outcome"], void["error"]) == ("tool_failed", "no connection")
    assert (void["reward"], void["exact_match"], void["retrieval_hit"]) == (None, None, None)
    assert (records[4]["reward"], records[4]["exact_match"]) == (0.0, 0.0)


def test_the_runs_of_the_mask_give_the_mask_back(tmp_path: Path) -> None:
    scored = groups()
    write_trajectories(tmp_path / "log.jsonl", scored)
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    trajectories = [trajectory for item in scored for trajectory in item.group.trajectories]
    for line, trajectory in zip(lines, trajectories, strict=True):
        runs = json.loads(line)["provenance"]
        assert [tag for tag, length in runs for _ in range(length)] == trajectory.provenance
        assert all(left[0] != right[0] for left, right in pairwise(runs))


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (2, {"step-000002.rank0", "step-000002.rank1", "eval-000002.rank0", "eval.rank0"}),
        (0, {"eval.rank0"}),
        (
            9,
            {
                "step-000002.rank0",
                "step-000002.rank1",
                "step-000003.rank1",
                "eval-000002.rank0",
                "eval.rank0",
            },
        ),
    ],
)
def test_what_was_written_about_later_steps_goes(tmp_path: Path, step: int, kept: set[str]) -> None:
    """Also files that nobody would write over: those of ranks that there are no more."""
    names = ("step-000002.rank0", "step-000002.rank1", "step-000003.rank1", "eval-000002.rank0", "eval.rank0")
    paths = [tmp_path / "trajectories" / f"{name}.jsonl" for name in names]
    paths += [tmp_path / "eval" / f"step-00000{number}.json" for number in (2, 3)]
    paths += [tmp_path / "trainer_logprobs" / f"step-00000{number}.rank0.jsonl" for number in (2, 3)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    drop_later(tmp_path, step)
    assert {path.name.removesuffix(".jsonl") for path in (tmp_path / "trajectories").iterdir()} == kept
    evaluations = {path.name for path in (tmp_path / "eval").iterdir()}
    assert evaluations == {f"step-00000{number}.json" for number in (2, 3) if number <= step}
    logprobs = {path.name for path in (tmp_path / "trainer_logprobs").iterdir()}
    assert logprobs == {f"step-00000{number}.rank0.jsonl" for number in (2, 3) if number <= step}


def test_the_trainers_logprobs_go_by_trajectory(tmp_path: Path) -> None:
    """In one file; a second optimizer step on a trajectory has another policy, and is left out."""
    first = importance_inputs([-0.1, -0.2, -0.30004], index=[0, 0, 1], ids=["7/0", "7/1"])
    again = importance_inputs([-9.0, -0.5], index=[0, 1], ids=["7/1", "8/0"])
    write_trainer_logprobs(tmp_path / "folder" / "file.jsonl", [first, again])
    lines = (tmp_path / "folder" / "file.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": "7/0", "logprobs": [-0.1, -0.2]},
        {"id": "7/1", "logprobs": [-0.3]},
        {"id": "8/0", "logprobs": [-0.5]},
    ]


def importance_inputs(logprobs: list[float], *, index: list[int], ids: list[str]) -> ImportanceInputs:
    return ImportanceInputs(
        old_logprobs=torch.tensor(logprobs),
        sampling_logprobs=torch.zeros(len(logprobs)),
        trajectory_index=torch.tensor(index),
        trajectory_ids=ids,
    )
