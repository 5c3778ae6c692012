"""One answer to a held-out question, scored; and the files that keep answers, line by line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from searchrl.answers import contains_answer, exact_match, f1, sub_exact_match
from searchrl.records import trajectory_record
from searchrl.rewards import is_retrieval_hit, is_valid_format
from searchrl.trajectory import Example, Group, Outcome, Trajectory

_SCORES = ("exact_match", "f1", "sub_exact_match", "valid_format", "retrieval_hit")


@dataclass(kw_only=True, slots=True, frozen=True)
class Result:
    """One answer. A void trajectory counts as a wrong one: it scores 0 everywhere, and is shown."""

    id: str
    """Of the question."""
    data_source: str
    hops: int
    outcome: Outcome
    exact_match: bool
    f1: float
    sub_exact_match: bool
    valid_format: bool
    retrieval_hit: bool
    """A gold answer stands in a document that the policy read ("gold shown")."""
    searches: int
    searches_with_gold: int
    """Those that retrieved a gold answer, whether or not there was room left to read it."""
    sampled_tokens: int
    total_tokens: int
    """The whole stream, prompt and observations included."""
    error: str | None
    """Why the trajectory is void, if it is."""


def score_result(trajectory: Trajectory, example: Example, eos_text: str) -> Result:
    """Score one answer, PROTOCOL §2 and §5; whatever training rewards, evaluation scores the same.

    Args:
        trajectory: the finished episode.
        example: its question.
        eos_text: the end-of-message token as text.
    """
    scored, golds = not trajectory.outcome.is_void, example.golden_answers
    results = [turn.result for turn in trajectory.turns if turn.result is not None]
    found = [any(contains_answer(d.contents, golds) for d in result.documents) for result in results]
    return Result(
        id=example.id,
        data_source=example.data_source,
        hops=example.hops,
        outcome=trajectory.outcome,
        exact_match=scored and exact_match(trajectory.answer, golds),
        f1=f1(trajectory.answer, golds) if scored else 0.0,
        sub_exact_match=scored and sub_exact_match(trajectory.answer, golds),
        valid_format=scored and is_valid_format(trajectory, eos_text),
        retrieval_hit=scored and is_retrieval_hit(trajectory, example),
        searches=len(results),
        searches_with_gold=sum(found) if scored else 0,
        sampled_tokens=trajectory.num_sampled,
        total_tokens=len(trajectory.token_ids),
        error=trajectory.error,
    )


class AnswerLog:
    """Writes answers as they finish: trajectories for reading and, if asked for, results for resuming."""

    def __init__(self, trajectories: Path, results: Path | None = None, *, append: bool = False) -> None:
        """Open the files.

        Args:
            trajectories: a line for each trajectory.
            results: a line for each question, written after its trajectories: a question is finished when
                this line is whole.
            append: go on behind what the files hold.
        """
        paths = [trajectories] if results is None else [trajectories, results]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._files = [path.open("a" if append else "w", encoding="utf-8") for path in paths]

    def write(self, group: Group, results: Sequence[Result]) -> None:
        """One question with the results of its trajectories, in order."""
        for index, result in enumerate(results):
            scores = {name: None if result.outcome.is_void else getattr(result, name) for name in _SCORES}
            scores["error"] = result.error
            _append(self._files[0], trajectory_record(group, index, scores))
        for file in self._files[1:]:
            _append(file, {"id": group.example.id, "results": [asdict(result) for result in results]})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()


def _append(file: Any, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()  # a killed process loses nothing that was finished


def finished_questions(folder: Path) -> dict[str, list[Result]]:
    """Results by question id that the ranks of an earlier evaluation left in ``folder``.

    A question with a void trajectory is not finished: its search failed, and is tried again. A last line
    that was cut short is removed, so that the files can be appended to.
    """
    finished: dict[str, list[Result]] = {}
    for path in sorted(folder.glob("results.rank*.jsonl")):
        drop_partial_line(path)
        with path.open(encoding="utf-8") as file:
            for line in file:  # not splitlines(), which also breaks at U+2028 inside an id
                row = json.loads(line)
                results = [_result(fields) for fields in row["results"]]
                if not any(result.outcome.is_void for result in results):
                    finished[row["id"]] = results
    return finished


def drop_partial_line(path: Path) -> None:
    """Cut what stands behind the last newline: a killed process may have written half a line."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("rb+") as file:
            file.truncate(whole)


def save_results(path: Path, results: Sequence[Result]) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results]), encoding="utf-8")


def load_results(path: Path) -> list[Result]:
    """Read what ``save_results`` wrote."""
    return [_result(row) for row in json.loads(path.read_text(encoding="utf-8"))]


def _result(fields: dict[str, Any]) -> Result:
    return Result(**{**fields, "outcome": Outcome(fields["outcome"])})
