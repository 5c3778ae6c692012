"""A folder that is whole or is found out: a manifest with the size and SHA-256 of every file.

A folder is written under another name, its files and then the folder itself are flushed to the disk, and one
rename makes it appear. So whatever ends a run, power included, a checkpoint is there as a whole or not at
all. What happens to it later, the manifest tells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from searchrl.data.files import flush, sha256
from searchrl.errors import SearchrlError

MANIFEST = "manifest.json"
FORMAT = 1
"""Raised when checkpoints change so that older ones cannot be read."""


class CheckpointError(SearchrlError, RuntimeError):
    """A checkpoint cannot be written or used; the message names it and the remedy."""


@dataclass(kw_only=True, slots=True, frozen=True)
class FileRecord:
    """One file, as it was written."""

    bytes: int
    sha256: str


def seal_files(paths: Sequence[Path]) -> dict[str, FileRecord]:
    """Flush files to the disk; their records by name."""
    records = {}
    for path in paths:
        flush(path)
        records[path.name] = FileRecord(bytes=path.stat().st_size, sha256=sha256(path))
    return records


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write, and flush to the disk."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush(path)


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Name all other files of the folder; the last to be written."""
    files = {name: asdict(record) for name, record in sorted(records.items())}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The records of the folder's files.

    Raises:
        CheckpointError: there is no manifest of this format; says so in a few words, without the folder.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"has format {manifest['format']}, this version reads {FORMAT}")
        return {name: FileRecord(**record) for name, record in manifest["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"has a {MANIFEST} that cannot be read") from error


def find_damage(folder: Path, *, part: int = 0, parts: int = 1) -> str:
    """What is wrong with the folder in a few words; empty if it is as it was written.

    Args:
        folder: with a manifest.
        part: which of its files are looked at, from 0: those at ``part``, ``part + parts``, …
        parts: among how many readers the work is shared; together they look at all.
    """
    try:
        records = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    for name in sorted(records)[part::parts]:
        record, path = records[name], folder / name
        if not path.is_file():
            return f"lacks {name}"
        size = path.stat().st_size
        if size != record.bytes:
            return f"has {size:,} of the {record.bytes:,} bytes of {name}"
        if sha256(path) != record.sha256:
            return f"has other bytes in {name} than were written"
    return ""
