"""Trajectory files as a page needs them: a small index of all, and their transcripts in compressed chunks.

The index has a column for everything that is listed, filtered or searched. A chunk holds whole groups, which
are shown side by side, and is read when one of them is.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from searchrl.report.tokens import TokenTexts
from searchrl.trajectory import Outcome, Provenance

CHUNK_CHARS = 1_000_000
"""A chunk ends with the group that exceeds this: as JSON, before compression. Read in about 20 ms."""

GROUP_COLUMNS = ("id", "question", "question_id", "gold", "hops", "evaluation", "step", "chunk", "place")
ROW_COLUMNS = ("group", "member", "outcome", "reward", "exact", "searches", "sampled", "answer", "queries")
OUTCOMES = tuple(str(outcome) for outcome in Outcome)
_NAME = re.compile(r"(step|eval)(?:-(\d+))?\.rank(\d+)\.jsonl")
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What a line that is not one of ours raises, wherever it differs."""


@dataclass(kw_only=True, slots=True, frozen=True)
class TrajectoryFile:
    """One file of a run's ``trajectories/``."""

    path: Path
    is_evaluation: bool
    step: int
    """The step that it belongs to; of an evaluation: after so many."""
    logprobs: tuple[Path, ...]
    """Files with the trainer's log-probabilities of the step, of all ranks."""

    @property
    def signature(self) -> tuple[tuple[int, int], ...]:
        """Changes when the file, or one that belongs to it, does."""
        stats = [path.stat() for path in (self.path, *self.logprobs)]
        return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


@dataclass(kw_only=True, slots=True)
class Part:
    """What one file amounts to. Columns are lists of the same length."""

    groups: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in GROUP_COLUMNS})
    rows: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in ROW_COLUMNS})
    chunks: list[bytes] = field(default_factory=list)
    """gzip of JSON."""
    damaged: int = 0
    """Lines that could not be read."""


def trajectory_files(run_dir: Path) -> list[TrajectoryFile]:
    """The run's files in the order of steps, evaluations after the steps that precede them."""
    found = []
    for path in (run_dir / "trajectories").glob("*.jsonl"):
        match = _NAME.fullmatch(path.name)
        if match is not None:
            kind, step, _ = match.groups()
            logprobs = (run_dir / "trainer_logprobs").glob(f"step-{step}.rank*.jsonl")
            found.append(
                TrajectoryFile(
                    path=path,
                    is_evaluation=kind == "eval",
                    step=int(step or 0),
                    logprobs=tuple(sorted(logprobs)) if kind == "step" else (),
                )
            )
    return sorted(found, key=lambda file: (file.step, file.is_evaluation, file.path.name))


def read_part(file: TrajectoryFile, tokens: TokenTexts | None) -> Part:
    """Read a file. Lines that are damaged are counted, and left out.

    Args:
        file: which.
        tokens: for tokens one by one; None: turns stay whole.
    """
    part = Part()
    trainer = _trainer_logprobs(file.logprobs, part)
    records = _records(file.path, part)
    members: list[str] = []
    size = 0
    for _, lines in groupby(records, key=lambda record: str(record["id"]).rpartition("/")[0]):
        packed = _pack_group(list(lines), file, tokens, trainer, part, place=len(members))
        if packed is None:
            continue
        members.append(packed)
        size += len(packed)
        if size > CHUNK_CHARS:
            part.chunks.append(_compressed(members))
            members, size = [], 0
    if members:
        part.chunks.append(_compressed(members))
    return part


def index_columns(parts: Sequence[Part]) -> dict[str, dict[str, list[Any]]]:
    """The index of all parts together; groups and chunks are counted through."""
    groups: dict[str, list[Any]] = {name: [] for name in GROUP_COLUMNS}
    rows: dict[str, list[Any]] = {name: [] for name in ROW_COLUMNS}
    chunks = 0
    for part in parts:
        first = len(groups["id"])
        for name in GROUP_COLUMNS:
            groups[name] += (
                [chunks + at for at in part.groups[name]] if name == "chunk" else part.groups[name]
            )
        for name in ROW_COLUMNS:
            rows[name] += [first + at for at in part.rows[name]] if name == "group" else part.rows[name]
        chunks += len(part.chunks)
    return {"groups": groups, "rows": rows}


def finite(value: object) -> float | None:
    """The number, unless it is none or not finite: JSON knows neither NaN nor infinities."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _all_finite(values: Sequence[float]) -> Sequence[float | None]:
    """``finite`` of each; of millions nearly none is anything else."""
    return values if all(map(math.isfinite, values)) else [finite(value) for value in values]


def _records(path: Path, part: Part) -> Iterator[dict[str, Any]]:
    """JSON lines that name a trajectory. The last may lack its end: it is being written, or was cut."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                _ = record["id"], record["turns"], record["question"]
            except _UNREADABLE:
                part.damaged += 1
            else:
                yield record


def _trainer_logprobs(paths: Sequence[Path], part: Part) -> dict[str, list[float]]:
    known: dict[str, list[float]] = {}
    for path in paths:
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    known[str(record["id"])] = list(record["logprobs"])
                except _UNREADABLE:
                    part.damaged += 1
    return known


def _pack_group(
    records: Sequence[Mapping[str, Any]],
    file: TrajectoryFile,
    tokens: TokenTexts | None,
    trainer: Mapping[str, Sequence[float]],
    part: Part,
    *,
    place: int,
) -> str | None:
    """A group's transcripts as JSON, after its rows went into the index; None if no line of it is whole."""
    try:
        about = _about(records[0], file)
    except _UNREADABLE:
        part.damaged += len(records)
        return None
    members, prompt, group = [], None, len(part.groups["id"])
    for record in records:
        try:
            row = _row(record)
            member = _transcript(record, tokens, trainer.get(str(record["id"])))
            prompt = prompt or _prompt(record, tokens)
        except _UNREADABLE:
            part.damaged += 1
            continue
        members.append(member)
        for name, value in {**row, "group": group}.items():
            part.rows[name].append(value)
    if not members:
        return None
    for name, value in {**about, "chunk": len(part.chunks), "place": place}.items():
        part.groups[name].append(value)
    return json.dumps({"prompt": prompt, "members": members}, allow_nan=False, separators=(",", ":"))


def _about(record: Mapping[str, Any], file: TrajectoryFile) -> dict[str, Any]:
    """What the members of a group have in common."""
    return {
        "id": str(record["id"]).rpartition("/")[0],
        "question": str(record["question"]),
        "question_id": str(record.get("question_id", "")),
        "gold": [str(answer) for answer in record.get("golden_answers", ())],
        "hops": int(record.get("hops", 0)),
        "evaluation": int(file.is_evaluation),
        "step": file.step,
    }


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    turns = record["turns"]
    return {
        "member": str(record["id"]).rpartition("/")[2],
        "outcome": OUTCOMES.index(record["outcome"]),
        "reward": finite(record.get("reward")),
        "exact": finite(record.get("exact_match")),
        "searches": sum(turn.get("query") is not None for turn in turns),
        "sampled": sum(len(turn["token_ids"]) for turn in turns),
        "answer": None if record.get("answer") is None else str(record["answer"]),
        "queries": "\n".join(str(turn["query"]) for turn in turns if turn.get("query") is not None),
    }


def _prompt(record: Mapping[str, Any], tokens: TokenTexts | None) -> dict[str, Any]:
    """The prompt's text, where its ids were kept and can be read, and its length."""
    length = sum(count for tag, count in record["provenance"] if tag == Provenance.PROMPT)
    ids = record.get("prompt_ids")
    return {"tokens": length, "text": "".join(tokens.decode(ids)) if ids and tokens is not None else None}


def _transcript(
    record: Mapping[str, Any], tokens: TokenTexts | None, trainer: Sequence[float] | None
) -> dict[str, Any]:
    turns, start = [], 0
    lengths = iter([count for tag, count in record["provenance"] if tag not in ("prompt", "sampled")])
    for turn in record["turns"]:
        size, text = len(turn["token_ids"]), str(turn["sampled"])
        pieces = None if tokens is None else tokens.split(turn["token_ids"], text)
        of_turn = None if trainer is None else _all_finite(trainer[start : start + size])
        appended = turn.get("appended_by")
        turns.append(
            {
                "tokens": pieces,
                "text": text if pieces is None else None,
                "logprobs": _all_finite(turn["logprobs"]),
                "trainer": of_turn if of_turn is not None and len(of_turn) == size else None,
                "finish": str(turn.get("finish", "")),
                "version": turn.get("policy_version"),
                "query": turn.get("query"),
                "search": turn.get("search"),
                "seconds": finite(turn.get("search_seconds")),
                "documents": [_document(document) for document in turn.get("documents", ())],
                "appended": str(turn.get("appended", "")),
                "appended_by": appended,
                "appended_tokens": next(lengths, 0) if appended else 0,
            }
        )
        start += size
    parts = record.get("components") or {}
    return {
        "error": record.get("error"),
        "components": {str(name): finite(value) for name, value in parts.items() if value},
        "flags": {name: record.get(name) for name in ("valid_format", "retrieval_hit", "evidence", "judged")},
        "turns": turns,
    }


def _document(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": str(document["id"]), "title": str(document["title"]), "score": finite(document["score"])}


def _compressed(groups: Sequence[str]) -> bytes:
    return gzip.compress(f"[{','.join(groups)}]".encode(), compresslevel=5, mtime=0)
