"""Rows of JSONL and Parquet files, one at a time, and the checks of their values.

Every ``DataError`` raised here names the file, the row, the field and what to do. JSONL lines count from 1,
as in an editor; Parquet rows from 0, as in pyarrow and pandas.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchrl.data.errors import DataError
from searchrl.trajectory import Message

if TYPE_CHECKING:
    import pyarrow.parquet as pq

Row = dict[str, object]

_BATCH_ROWS = 1024
"""Parquet rows that are Python objects at one time."""
_ROLES = ("system", "user", "assistant")


def jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each row of a JSONL file (``.gz``: compressed) with its place, ``line 3``. Skips blank lines.

    Raises ``DataError`` for a file that cannot be read, and at a line that is not UTF-8 or no JSON object.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = f"line {number}"
                    yield place, _json_object(line, f"{path}, {place}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no intact gzip file ({error}); download it again") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); correct the path or its rights"
        ) from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file; only its schema is read. Raises ``DataError`` if it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no intact Parquet file ({error}); download or write it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); correct the path or its rights") from error


def parquet_rows(file: pq.ParquetFile, path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Yield each row's ``columns`` with its place, ``row 0``, a batch in memory at a time.

    Raises ``DataError`` where the file is damaged.
    """
    import pyarrow as pa

    number = 0
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged after row {number} ({error}); download it again") from error


def field(row: Row, name: str, where: str) -> object:
    """The value of a field that must be there."""
    if name not in row:
        raise DataError(f"{where}, field '{name}': missing; the row has {', '.join(row) or 'no fields'}")
    return row[name]


def string(value: object, name: str, where: str) -> str:
    """The value, which must be text: not blank, and encodable."""
    if not isinstance(value, str):
        raise DataError(f"{where}, field '{name}': expected a string, got {value!r}; quote it")
    if not value.strip():
        raise DataError(f"{where}, field '{name}': empty; fill it or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}, field '{name}': half a surrogate pair at character {error.start}; repair the text"
        ) from error
    return value


def answers(value: object, name: str, where: str) -> tuple[str, ...]:
    """The gold answers, which must be a list of text with at least one entry."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}, field '{name}': expected a list with at least one string, got {value!r}")
    return tuple(string(gold, name, where) for gold in value)


def published_answers(value: object, name: str, where: str) -> tuple[str, ...]:
    """Gold answers of a file that others published: one string or a list, blank ones left out.

    A blank answer can match nothing, so that leaving it out changes no score; one that is not blank must be
    there.
    """
    golds = [value] if isinstance(value, str) else value
    if isinstance(golds, list):
        golds = [gold for gold in golds if not isinstance(gold, str) or gold.strip()]
    return answers(golds, name, where)


def messages(value: object, name: str, where: str) -> tuple[Message, ...]:
    """A ready prompt: text, which becomes one user message, or messages of which the last is the user's."""
    if isinstance(value, str):
        return (Message(role="user", content=string(value, name, where)),)
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}, field '{name}': expected text or a list of {{role, content}} messages, got {value!r}"
        )
    found = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise DataError(
                f"{where}, field '{name}': expected a message with role ({', '.join(_ROLES)}) and content, "
                f"got {message!r}"
            )
        content = string(message.get("content"), f"{name}.content", where)
        found.append(Message(role=message["role"], content=content))
    if found[-1].role != "user":
        raise DataError(
            f"{where}, field '{name}': the last message is the {found[-1].role}'s; end with a user message, "
            "which the policy answers"
        )
    return tuple(found)


def mapping(value: object, name: str, where: str) -> dict[str, Any]:
    """The value, which must be an object."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where}, field '{name}': expected an object, got {value!r}; leave it out if unused")
    return dict(value)


def _json_object(line: bytes, where: str) -> Row:
    try:
        row: object = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); convert it"
        ) from error
    except (ValueError, RecursionError) as error:  # malformed, or nested without end
        raise DataError(f"{where}: not valid JSON ({error}); every line must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, not an object; every line must be one JSON object")
    return row
