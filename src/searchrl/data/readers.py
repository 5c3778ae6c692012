"""Read question sets from JSONL or Parquet, a row per question, every row checked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from searchrl.data.errors import DataError
from searchrl.data.rows import (
    Row,
    answers,
    field,
    jsonl_rows,
    mapping,
    messages,
    open_parquet,
    parquet_rows,
    published_answers,
    string,
)
from searchrl.trajectory import Example, Message

_FIELDS = ("id", "question", "golden_answers", "data_source")
_SEARCH_R1_FIELDS = ("data_source", "prompt", "reward_model")
_QUESTION_MARK = "Question:"
"""What a question stands behind in a ready prompt that was made of instructions and a question."""

_Convert = Callable[[Row, str, str], Row]
"""A row as the file has it, its place (``row 3``) and ``FILE, row 3``, to a row of our form."""


def read_examples(path: Path, *, prompt_column: str = "") -> list[Example]:
    """The rows of a question set, in its order: Parquet by the suffix, else JSONL (``.gz``: compressed).

    A row is ``{"id", "question", "golden_answers": [str], "data_source", "metadata": {}}``; ``metadata`` may
    be missing, in Parquet also be a JSON object as text; other fields are ignored. Parquet with the columns
    of Search-R1's files is read as such, see ``_from_search_r1``. ``prompt_column`` names a field that holds
    a ready prompt, text or ``{role, content}`` messages.

    Raises ``DataError`` naming file, row and field for a missing or malformed file, a wrong or empty value, a
    repeated id, and a file without rows.
    """
    if not path.exists():
        raise DataError(
            f"{path} does not exist. Build the worldfacts set with `searchrl data worldfacts`, fetch "
            "published sets with `searchrl data prepare`, or set the path to a JSONL or Parquet file of your "
            "own."
        )
    rows, convert = _parquet(path, prompt_column) if path.suffix == ".parquet" else (jsonl_rows(path), _as_is)
    examples: list[Example] = []
    places: dict[str, str] = {}
    for place, row in rows:
        where = f"{path}, {place}"
        prompt = messages(field(row, prompt_column, where), prompt_column, where) if prompt_column else None
        example = _example(convert(row, place, where), where, prompt)
        if (first := places.setdefault(example.id, place)) != place:
            raise DataError(f"{where}, field 'id': {example.id!r} is also the id of {first}; make ids unique")
        examples.append(example)
    if not examples:
        raise DataError(f"{path} holds no rows; build or download it again")
    return examples


def first_of_each_source(examples: Sequence[Example], limit: int) -> list[Example]:
    """The first ``limit`` questions of every data source, in the file's order; 0: all."""
    if limit == 0:
        return list(examples)
    seen: Counter[str] = Counter()
    chosen = []
    for example in examples:
        seen[example.data_source] += 1
        if seen[example.data_source] <= limit:
            chosen.append(example)
    return chosen


def _example(row: Row, where: str, prompt: tuple[Message, ...] | None) -> Example:
    return Example(
        id=string(field(row, "id", where), "id", where),
        question=string(field(row, "question", where), "question", where),
        golden_answers=answers(field(row, "golden_answers", where), "golden_answers", where),
        data_source=string(field(row, "data_source", where), "data_source", where),
        metadata=mapping(row.get("metadata", {}), "metadata", where),
        prompt=prompt,
    )


def _parquet(path: Path, prompt_column: str) -> tuple[Iterator[tuple[str, Row]], _Convert]:
    """The rows of a Parquet file, with only the columns that are needed, and how to convert them."""
    file = open_parquet(path)
    there = file.schema_arrow.names
    published = all(name in there for name in _SEARCH_R1_FIELDS)
    needed = list(_SEARCH_R1_FIELDS if published else _FIELDS)
    if prompt_column:
        needed.append(prompt_column)
    if missing := [name for name in needed if name not in there]:
        raise DataError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(there)}. Rename them, or set "
            "data.prompt_column to a column that is there"
        )
    needed += [name for name in (("question", "extra_info") if published else ("metadata",)) if name in there]
    return parquet_rows(file, path, needed), _from_search_r1 if published else _from_parquet


def _as_is(row: Row, place: str, where: str) -> Row:
    return row


def _from_parquet(row: Row, place: str, where: str) -> Row:
    """Metadata as text is decoded: one schema cannot hold the different metadata of several data sets."""
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}, field 'metadata': not valid JSON ({error}); write an object or a struct"
            ) from error
    return row | {"metadata": {} if metadata is None else metadata}


def _from_search_r1(row: Row, place: str, where: str) -> Row:
    """A row of Search-R1's files in our form.

    The id is ``SOURCE_SPLIT_ROW`` with the row's number in the file: ``extra_info.index`` and a column ``id``
    start anew with every data set. The answers are ``reward_model.ground_truth.target``. The question is the
    column ``question`` where there is one, else the last message of ``prompt``, and of that what follows the
    last ``Question:`` if that stands in it.
    """
    source = string(row["data_source"], "data_source", where)
    extra = mapping(row.get("extra_info") or {}, "extra_info", where)
    reward = mapping(row["reward_model"], "reward_model", where)
    truth = mapping(field(reward, "ground_truth", where), "reward_model.ground_truth", where)
    question = row.get("question")
    if question is None:
        last = messages(row["prompt"], "prompt", where)[-1].content
        question = last.rpartition(_QUESTION_MARK)[2].strip()
    split = extra.get("split")
    parts = (
        [source, str(split), place.removeprefix("row ")] if split else [source, place.removeprefix("row ")]
    )
    return {
        "id": "_".join(parts),
        "question": question,
        "golden_answers": list(
            published_answers(truth.get("target"), "reward_model.ground_truth.target", where)
        ),
        "data_source": source,
        "metadata": {name: extra[name] for name in ("split", "index") if extra.get(name) is not None},
    }
