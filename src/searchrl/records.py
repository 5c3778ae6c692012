"""What a rollout amounts to: its metrics, and its trajectories written out for reading."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchrl.answers import contains_answer
from searchrl.collapse import collapse_terms
from searchrl.metrics import Tally, Transcript
from searchrl.rewards import Reward, ScoredGroup
from searchrl.trajectory import Group, Outcome, Provenance, Trajectory, Turn

if TYPE_CHECKING:
    from searchrl.algorithm.importance import ImportanceInputs

SHOWN = 16
"""Trajectories of a step in the sample that is shown beside its numbers."""


def rollout_tally(scored: Sequence[ScoredGroup]) -> Tally:
    """Metrics of PROTOCOL §5 over the trajectories that are not void, and outcomes over all."""
    tally = Tally()
    for item in scored:
        for trajectory in item.group.trajectories:
            for outcome in Outcome:
                tally.add(f"rollout/outcome/{outcome}", float(trajectory.outcome is outcome))
        for index, reward in enumerate(item.rewards):
            tally.add("rollout/void", float(reward is None))
            if index in item.unscored or (reward is not None and reward.judged is not None):
                tally.add("reward/judge_failed", float(reward is None))
        for _, trajectory, reward in item.survivors:
            _add_trajectory(tally, trajectory, reward, item.group.example.golden_answers)
            if hops := item.group.example.hops:
                tally.add(f"reward/exact_match_{hops}_hop", reward.exact_match)
                tally.add(f"search_r1/search_calls_{hops}_hop", trajectory.num_searches)
    return tally


def policy_lag(scored: Sequence[ScoredGroup], version: int) -> tuple[float, float]:
    """How many updates older than ``version`` a token's policy was: the sum over tokens, and their number."""
    turns = [turn for item in scored for one in item.group.trajectories for turn in one.turns]
    lag = sum((version - turn.policy_version) * len(turn.token_ids) for turn in turns)
    return float(lag), float(sum(len(turn.token_ids) for turn in turns))


def _add_trajectory(
    tally: Tally, trajectory: Trajectory, reward: Reward, golden_answers: Sequence[str]
) -> None:
    provenance = trajectory.provenance
    response = len(provenance) - len(trajectory.prompt_ids)
    observed = sum(tag is Provenance.OBSERVATION for tag in provenance)
    tally.add("reward/mean", reward.total)
    tally.add("reward/exact_match", reward.exact_match)
    if reward.judged is not None:
        tally.add("reward/judge", float(reward.judged))
    for name, credit in reward.components.by_name().items():
        tally.add(f"reward/{name}", credit)
    tally.add("reward/valid_format", float(reward.valid_format))
    tally.add("search_r1/turns_per_sample", len(trajectory.turns))
    tally.add("search_r1/search_calls_per_sample", trajectory.num_searches)
    tally.add("loss_mask/observation_fraction", observed, response)
    tally.add("rollout/response_tokens", response)
    tally.add("rollout/sampled_tokens", trajectory.num_sampled)
    # What ``filters`` would drop, whether it is turned on or not.
    tally.add("filter/overlong", float(trajectory.is_overlong))
    tally.add("filter/void_turns", float(trajectory.has_void_turn))
    tally.add("retrieval/hit", float(reward.retrieval_hit))
    if reward.evidence is not None:
        tally.add("retrieval/evidence", float(reward.evidence))
    for name, (value, weight) in collapse_terms(trajectory, correct=reward.exact_match == 1.0).items():
        tally.add(f"collapse/{name}", value, weight)
    for turn in trajectory.turns:
        tally.add("rollout/invalid_turns", float(turn.is_invalid))
        if turn.call is not None:
            tally.add("rollout/queries_cut", float(turn.call.truncated))
        if turn.result is not None:
            found = any(contains_answer(d.contents, golden_answers) for d in turn.shown_documents)
            tally.add("retrieval/recall_at_k", float(found))


def write_trajectories(path: Path, scored: Sequence[ScoredGroup]) -> None:
    """One JSON line per trajectory: question, turns as text, masks as runs, documents, scores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for item in scored:
            for index, reward in enumerate(item.rewards):
                scores = {"error": item.error(index), **_reward_scores(reward)}
                record = trajectory_record(item.group, index, scores)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def transcripts(scored: Sequence[ScoredGroup]) -> list[Transcript]:
    """The first ``SHOWN`` trajectories, groups side by side."""
    return [
        Transcript(
            question=item.group.example.question,
            answer=trajectory.answer or "",
            gold=" | ".join(item.group.example.golden_answers),
            outcome=str(trajectory.outcome),
            reward=None if reward is None else reward.total,
            searches=trajectory.num_searches,
            transcript="".join(turn.text + turn.observation_text for turn in trajectory.turns),
        )
        for item in scored
        for trajectory, reward in zip(item.group.trajectories, item.rewards, strict=True)
    ][:SHOWN]


def write_trainer_logprobs(path: Path, compared: Iterable[ImportanceInputs]) -> None:
    """One JSON line per trained trajectory: its id, and what the trainer gave its sampled tokens.

    Beside the engine's in the trajectory files it gives the ratio that the importance correction saw.

    Args:
        path: the file of this step and rank.
        compared: of the update; a trajectory that several optimizer steps saw is written as the first did.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written: set[str] = set()
    with path.open("w", encoding="utf-8") as file:
        for inputs in compared:
            index, values = inputs.trajectory_index.tolist(), inputs.old_logprobs.tolist()
            tokens = iter([round(value, 4) for value in values])
            for number, run in groupby(index):  # a trajectory's tokens stand together
                record = {"id": inputs.trajectory_ids[number], "logprobs": [next(tokens) for _ in run]}
                if record["id"] not in written:
                    written.add(record["id"])
                    file.write(json.dumps(record) + "\n")


def drop_later(run_dir: Path, step: int) -> None:
    """Delete later steps' trajectories and evaluations: a run that continues after ``step`` makes them anew.

    They would not all be written over: another number of ranks writes other files.
    """
    for folder in ("trajectories", "trainer_logprobs", "eval"):
        for path in (run_dir / folder).glob("*.json*"):
            numbered = re.match(r"(?:step|eval)-(\d+)\.", path.name)
            if numbered is not None and (int(numbered[1]) > step or step == 0):
                path.unlink()


def _reward_scores(reward: Reward | None) -> dict[str, Any]:
    return {
        "reward": None if reward is None else reward.total,
        "components": None if reward is None else reward.components.by_name(),
        "exact_match": None if reward is None else reward.exact_match,
        "judged": None if reward is None else reward.judged,
        "valid_format": None if reward is None else reward.valid_format,
        "retrieval_hit": None if reward is None else reward.retrieval_hit,
        "evidence": None if reward is None else reward.evidence,
    }


def trajectory_record(group: Group, index: int, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Trajectory ``index`` of a group, for reading, with its ``scores`` and ``error`` by name."""
    example, trajectory = group.example, group.trajectories[index]
    return {
        "id": f"{group.id}/{index}",
        "question_id": example.id,
        "question": example.question,
        "golden_answers": example.golden_answers,
        "hops": example.hops,
        "outcome": trajectory.outcome,
        "answer": trajectory.answer,
        **scores,
        "provenance": [[tag, len(list(run))] for tag, run in groupby(trajectory.provenance)],
        "prompt_ids": trajectory.prompt_ids,
        "turns": [_turn_record(turn) for turn in trajectory.turns],
    }


def _turn_record(turn: Turn) -> dict[str, Any]:
    return {
        "sampled": turn.text,
        "finish": turn.finish,
        "policy_version": turn.policy_version,
        "token_ids": turn.token_ids,
        "logprobs": [round(value, 4) for value in turn.logprobs],
        "query": None if turn.call is None else turn.call.query,
        "search": None if turn.result is None else turn.result.status,
        "documents": [
            {"id": document.id, "title": document.title, "score": round(document.score, 4)}
            for document in (turn.result.documents if turn.result is not None else ())
        ],
        "search_seconds": None if turn.result is None else round(turn.result.seconds, 4),
        "appended": turn.observation_text,
        "appended_by": turn.observation_provenance if turn.observation_ids else None,
    }
