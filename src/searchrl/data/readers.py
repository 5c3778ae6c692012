"""Read question sets: JSON lines, a row per question, every row checked."""

from __future__ import annotations

import json
from pathlib import Path

from searchrl.data.errors import DataError
from searchrl.trajectory import Example


def read_examples(path: Path) -> list[Example]:
    """The rows of a JSONL file, in its order. Blank lines are skipped.

    A row is ``{"id", "question", "golden_answers": [str], "data_source", "metadata": {}}``; ``metadata`` may
    be missing, other fields are ignored. Raises ``DataError`` naming file, line and field for a missing or
    malformed file, a wrong or empty value, a repeated id, and a file without rows.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist. Build the worldfacts set with `searchrl data worldfacts`, or set the "
            "path to a JSONL file of your own."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it"
        ) from error
    examples: list[Example] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        example = _example(line, where)
        if (first := lines.setdefault(example.id, number)) != number:
            raise DataError(
                f"{where}, field 'id': {example.id!r} is also the id of line {first}; make ids unique"
            )
        examples.append(example)
    if not examples:
        raise DataError(f"{path} holds no rows; build or download it again")
    return examples


def _example(line: str, where: str) -> Example:
    try:
        row: object = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}); every line must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, not an object; every line must be one JSON object")
    golds = _field(row, "golden_answers", where)
    if not isinstance(golds, list) or not golds:
        raise DataError(
            f"{where}, field 'golden_answers': expected a list with at least one string, got {golds!r}"
        )
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise DataError(
            f"{where}, field 'metadata': expected an object, got {metadata!r}; leave it out if unused"
        )
    return Example(
        id=_string(_field(row, "id", where), "id", where),
        question=_string(_field(row, "question", where), "question", where),
        golden_answers=tuple(_string(gold, "golden_answers", where) for gold in golds),
        data_source=_string(_field(row, "data_source", where), "data_source", where),
        metadata=metadata,
    )


def _field(row: dict[str, object], name: str, where: str) -> object:
    if name not in row:
        raise DataError(
            f"{where}, field '{name}': missing; a row needs id, question, golden_answers and data_source"
        )
    return row[name]


def _string(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}, field '{name}': expected a string, got {value!r}; quote it")
    if not value.strip():
        raise DataError(f"{where}, field '{name}': empty; fill it or drop the row")
    return value
