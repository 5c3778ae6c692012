r"""A passage corpus as JSON lines, memory-mapped, with an offset for each line: never loaded whole.

A line is ``{"id": "0", "contents": "\"Title\"\ntext"}``. Beside ``corpus.jsonl`` lie two derived files,
``corpus.jsonl.offsets.npy`` (uint64 [rows + 1], where each line starts, then the file's end) and
``corpus.jsonl.offsets.json`` (the size, time and SHA-256 of the corpus they were made from). Both are remade
when the corpus changed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from searchrl.errors import InputError
from searchrl.retrieval.wire import encodable

_CHUNK = 1 << 22
GZIP_MAGIC = b"\x1f\x8b"
"""First bytes of a gzip file."""


class CorpusError(InputError, ValueError):
    """The corpus file is missing, compressed, empty or has a malformed line."""


class Passage(NamedTuple):
    """One line of the corpus."""

    id: str
    contents: str


@dataclass(kw_only=True, slots=True, frozen=True)
class _Stamp:
    """What the offsets were made from."""

    size: int
    mtime_ns: int
    rows: int
    sha256: str


class Corpus:
    """Random access to the passages of a JSONL file by row.

    Raises `CorpusError` on a file that cannot be a corpus, and on reading a malformed line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CorpusError(f"no corpus at {self.path}; name the JSONL file of passages")
        if self.path.stat().st_size == 0:
            raise CorpusError(f"{self.path} is empty")
        with self.path.open("rb") as file:
            if file.read(2) == GZIP_MAGIC:
                raise CorpusError(
                    f"{self.path} is gzip-compressed, which cannot be memory-mapped: gunzip it first, or "
                    "give the file that `searchrl index build` unpacked beside it"
                )
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets, self._stamp = _load_or_scan(self.path)

    def __len__(self) -> int:
        """Number of passages."""
        return self._stamp.rows

    def __getitem__(self, row: int) -> Passage:
        """Return passage ``row`` (0-based); raise `CorpusError` naming the line if it is malformed.

        A lone surrogate, a flaw of one passage among millions, becomes U+FFFD, as for who asks over HTTP.
        """
        where = f"{self.path}, line {row + 1}"
        try:
            record = json.loads(self.raw(row).decode("utf-8"))
        except (ValueError, RecursionError) as error:  # malformed JSON or UTF-8, nested without end
            raise CorpusError(f"{where}: not a JSON object in UTF-8: {error}") from error
        if not isinstance(record, dict):
            raise CorpusError(f"{where}: expected a JSON object, found {type(record).__name__}")
        id_, contents = record.get("id"), record.get("contents")
        if isinstance(id_, int) and not isinstance(id_, bool):
            id_ = str(id_)
        if not isinstance(id_, str) or not isinstance(contents, str):
            raise CorpusError(
                f'{where}: needs the strings "id" and "contents", has the keys {sorted(record)}'
            )
        return Passage(encodable(id_), encodable(contents))

    def raw(self, row: int) -> bytes:
        """Return line ``row`` as it stands in the file, without its newline: already a JSON object."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} passages")
        return self._map[int(self._offsets[row]) : int(self._offsets[row + 1])].rstrip(b"\r\n")

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the whole file; what an index is tied to."""
        return self._stamp.sha256

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()


def _load_or_scan(path: Path) -> tuple[npt.NDArray[np.uint64], _Stamp]:
    """Return offsets [rows + 1] and their stamp: from the side files if they are current, else by a scan."""
    status = path.stat()
    offsets_path, stamp_path = _side_file(path, ".offsets.npy"), _side_file(path, ".offsets.json")
    try:
        stamp = _Stamp(**json.loads(stamp_path.read_text()))
        if (stamp.size, stamp.mtime_ns) == (status.st_size, status.st_mtime_ns):
            offsets = np.load(offsets_path, mmap_mode="r")
            if offsets.shape == (stamp.rows + 1,) and int(offsets[-1]) == stamp.size:
                return offsets, stamp
    except (OSError, EOFError, ValueError, TypeError, RecursionError):
        pass  # missing, torn or written by another version: the scan below replaces them
    offsets, digest = _scan(path)
    stamp = _Stamp(size=status.st_size, mtime_ns=status.st_mtime_ns, rows=len(offsets) - 1, sha256=digest)
    try:
        temporary = _side_file(path, f".{os.getpid()}.tmp.npy")
        np.save(temporary, offsets)
        temporary.replace(offsets_path)
        temporary.write_text(json.dumps(asdict(stamp)))
        temporary.replace(stamp_path)
        offsets = np.load(offsets_path, mmap_mode="r")  # 8 bytes a passage that need not be held
    except OSError:
        pass  # a read-only folder: offsets stay in memory, the next start scans again
    return offsets, stamp


def _scan(path: Path) -> tuple[npt.NDArray[np.uint64], str]:
    """Read the file once; return where its lines start (and its end), and its SHA-256."""
    digest = hashlib.sha256()
    offsets = np.zeros(1 << 16, dtype=np.uint64)
    lines, position, last = 0, 0, b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            newlines = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
            if lines + len(newlines) + 2 > len(offsets):
                # In place if it is large.
                offsets.resize(len(offsets) * 5 // 4 + len(newlines) + 2, refcheck=False)
            offsets[lines + 1 : lines + 1 + len(newlines)] = newlines + (position + 1)
            lines += len(newlines)
            position += len(chunk)
            last = chunk[-1:]
    if last != b"\n":
        lines += 1
        offsets[lines] = position
    offsets = offsets[: lines + 1]
    blank = np.flatnonzero(np.diff(offsets) <= 1)
    if len(blank):
        raise CorpusError(f"{path}, line {int(blank[0]) + 1}: blank line; every line must hold a passage")
    return offsets, digest.hexdigest()


def _side_file(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
