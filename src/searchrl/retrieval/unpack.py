"""Unpack a gzip-compressed corpus once, beside it: what is compressed cannot be memory-mapped."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path

from searchrl.retrieval.corpus import GZIP_MAGIC, CorpusError
from searchrl.retrieval.dense_build import require_space
from searchrl.retrieval.progress import progress, say

_RATIO = 4
"""Text grows by about three when it is unpacked; by how much is not known before."""
_CHUNK = 1 << 22


def unpacked(path: Path) -> Path:
    """Return ``path``, or what it unpacks to if it is gzip-compressed: the file without ``.gz`` beside it.

    Does nothing if that was unpacked before from the same file. Raises `CorpusError` if the archive is
    damaged, or if the place is taken by something else, and `BuildError` if there is no space on the disk.
    """
    if not path.is_file():
        raise CorpusError(f"no corpus at {path}; name the file of passages to unpack")
    with path.open("rb") as file:
        if file.read(len(GZIP_MAGIC)) != GZIP_MAGIC:
            return path
    if path.suffix != ".gz":
        raise CorpusError(f"{path} is gzip-compressed but not called so: rename it to {path.name}.gz")
    target, note = path.with_suffix(""), path.with_suffix(".gz.json")
    status = path.stat()
    source = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if target.exists():
        if _record(note) == source | {"unpacked_size": target.stat().st_size}:
            return target
        raise CorpusError(f"{target} is not what this program unpacked from {path}: remove one of the two")
    require_space(path.parent, _RATIO * status.st_size, f"unpacking {path.name}")
    say(f"unpacking {path} to {target}, once")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _unpack(path, temporary, status.st_size)
        note.write_text(json.dumps(source | {"unpacked_size": temporary.stat().st_size}))
        temporary.rename(target)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{path} is damaged ({error}): fetch it again") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _unpack(path: Path, target: Path, size: int) -> None:
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as source, target.open("wb") as sink:
        read = 0
        with progress(f"unpack {path.name}", size) as on_bytes:
            while chunk := source.read(_CHUNK):
                sink.write(chunk)
                on_bytes(packed.tell() - read)
                read = packed.tell()
        sink.flush()
        os.fsync(sink.fileno())


def _record(note: Path) -> object:
    try:
        record: object = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    return record
