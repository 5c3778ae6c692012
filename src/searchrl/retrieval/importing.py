"""Take an index that others published: a flat FAISS file in parts, as that of wiki-18 with E5.

The parts are joined once, into the place where the index stays, or behind the first of them. Then everything
that can be checked is: size, hash, rows, and whether the encoder makes these vectors from these passages.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from searchrl.config import IndexKind
from searchrl.retrieval.build import describe
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.dense_build import link, require_space
from searchrl.retrieval.encoder import Encoder, EncoderFamily, TextKind, encoder_dim
from searchrl.retrieval.flatfile import FlatHeader, RowStore, read_flat_header
from searchrl.retrieval.kinds import resolve_kind
from searchrl.retrieval.manifest import (
    DENSE,
    BuildError,
    IndexMismatchError,
    Manifest,
    is_index,
    put_in_place,
    record_encoder,
)
from searchrl.retrieval.progress import progress as show_progress
from searchrl.retrieval.unpack import unpacked
from searchrl.retrieval.workspace import workspace

_CHUNK = 1 << 24
_PROBES = 16
_PROBE_SEED = 0
_SAME = 0.99
"""Least cosine of two vectors of the same text: apart are fp16 and texts that were cut elsewhere."""
_ROUNDING = 1e-3
"""What a cosine must be larger by to count."""
_WINDOW = 64
"""Rows before and after a probe in which its vector is looked for."""


def import_index(
    parts: Sequence[Path],
    directory: str | Path,
    *,
    corpus_path: Path,
    encoder_path: Path,
    encoder_family: EncoderFamily,
    sha256: str | None = None,
    rows: int | None = None,
    move: bool = False,
    progress: bool = True,
) -> Manifest:
    """Make an index of a published flat FAISS file, given in ``parts`` in their order; return its manifest.

    With ``move`` the parts are used up: the others are written behind the first, on the same file system, and
    deleted at the end; so the disk needs room for them only. A run that was killed is gone on with by the
    same call. ``sha256`` is that of the whole file, ``rows`` the number of vectors it should have.

    Raises:
        IndexMismatchError: the parts are no such file, or not of this corpus and encoder; says what differs.
        BuildError: no space, or ``directory`` holds something.
        CorpusError: the corpus cannot be read.
    """
    directory = Path(directory).absolute()
    if is_index(directory):
        raise BuildError(f"{directory} holds an index already: remove it, or choose another directory")
    parts = [part.absolute() for part in parts]
    with workspace(directory, {"import": [str(part) for part in parts]}) as work:
        joined = _Joined(work, parts)
        start = joined.header()
        corpus = Corpus(unpacked(corpus_path))
        _check_rows(start, rows, corpus, encoder_path)
        digest = joined.join(start, move=move, progress=progress)
        if sha256 is not None and digest != sha256.lower():
            joined.forget()
            raise IndexMismatchError(
                f"the parts have SHA-256 {digest} together, not {sha256}: fetch them again, or give "
                "them in their order" + (f"; the first is now at {joined.path}" if move else "")
            )
        _probe(RowStore(joined.path), corpus, encoder_path, encoder_family)
        finished = work / "index"
        finished.mkdir()
        link(joined.path, finished / DENSE)
        record = record_encoder(encoder_path, encoder_family, directory)
        flat = resolve_kind("flat", rows=start.rows, dim=start.dim)
        manifest = describe(finished, corpus, IndexKind.dense, record, flat, known={DENSE: digest})
        manifest.write(finished)
        put_in_place(finished, directory)
    if move:
        for part in parts:
            part.unlink(missing_ok=True)
    return manifest


class _Joined:
    """The parts in one file, which grows; beside it a note of their sizes, and at last of its hash."""

    def __init__(self, work: Path, parts: Sequence[Path]) -> None:
        self.path = work / "joined.faiss"
        self._parts = parts
        self._note = work / "joined.parts"
        self._moved = work / "moved"
        if self._note.exists():
            record = json.loads(self._note.read_text())
            self._sizes: list[int] = record["sizes"]
            self._digest: str | None = record["sha256"]
        else:
            missing = [str(part) for part in parts if not part.is_file()]
            if missing:
                raise IndexMismatchError(f"no such part: {', '.join(missing)}")
            self._sizes, self._digest = [part.stat().st_size for part in parts], None

    def header(self) -> FlatHeader:
        """The header of the whole; raises `IndexMismatchError` if the sizes do not fit it."""
        first = self._parts[0]
        found = read_flat_header(first if first.exists() else self.path)
        if found.size != (total := sum(self._sizes)):
            raise IndexMismatchError(
                f"{first.name} names {found.rows:,} vectors of {found.dim} numbers, {found.size:,} bytes; "
                f"the parts have {total:,} together: one is missing, incomplete or not the right one"
            )
        return found

    def join(self, start: FlatHeader, *, move: bool, progress: bool) -> str:
        """Write what is missing of the whole, and return its SHA-256."""
        if self._digest is not None:
            return self._digest
        held = self.path.stat().st_size if self.path.exists() else 0
        if move and not held:
            held = self._sizes[0]
        require_space(self.path.parent, start.size - held, "joining the parts")
        self._write_note()
        if move and not self.path.exists():
            self._take_first()
        digest = hashlib.sha256()
        with (
            show_progress("join and hash parts, bytes", start.size, enabled=progress) as on_bytes,
            self.path.open("a+b") as joined,
        ):
            joined.seek(0)
            held = _pass(joined.read, on_bytes, digest.update)
            for part, size in zip(self._parts, self._sizes, strict=True):
                if held < size:
                    with part.open("rb") as source:
                        source.seek(held)
                        _pass(source.read, on_bytes, digest.update, joined.write)
                held = max(0, held - size)
            joined.flush()
            os.fsync(joined.fileno())
        self._digest = digest.hexdigest()
        self._write_note()
        return self._digest

    def forget(self) -> None:
        """Drop the joined file, which is of no use, unless it is the only copy."""
        if not self._moved.exists():
            self.path.unlink()
            self._note.unlink()

    def _take_first(self) -> None:
        self._moved.touch()  # before the rename: from then on this folder holds the only copy
        try:
            self._parts[0].rename(self.path)
        except OSError as error:
            self._moved.unlink()
            raise BuildError(
                f"cannot move {self._parts[0]} to {self.path} ({error}): do without --move"
            ) from error

    def _write_note(self) -> None:
        temporary = self._note.with_suffix(".new")
        temporary.write_text(json.dumps({"sizes": self._sizes, "sha256": self._digest}))
        temporary.rename(self._note)


def _pass(
    read: Callable[[int], bytes], on_bytes: Callable[[int], None], *sinks: Callable[[bytes], object]
) -> int:
    """Hand everything that ``read`` gives to all ``sinks``; return the number of bytes."""
    total = 0
    while chunk := read(_CHUNK):
        for sink in sinks:
            sink(chunk)
        on_bytes(len(chunk))
        total += len(chunk)
    return total


def _check_rows(start: FlatHeader, rows: int | None, corpus: Corpus, encoder_path: Path) -> None:
    if rows is not None and rows != start.rows:
        raise IndexMismatchError(
            f"the parts hold {start.rows:,} vectors, not {rows:,}: these are other parts"
        )
    if len(corpus) != start.rows:
        raise IndexMismatchError(
            f"the parts hold {start.rows:,} vectors, but {corpus.path} has {len(corpus):,} passages: "
            "give the corpus that the index was made from"
        )
    if (dim := encoder_dim(encoder_path)) != start.dim:
        raise IndexMismatchError(
            f"the parts hold vectors of {start.dim} numbers, but the encoder {encoder_path} makes {dim}: "
            "give the encoder that the index was made with"
        )


def _probe(stored: RowStore, corpus: Corpus, encoder_path: Path, family: EncoderFamily) -> None:
    """Encode some passages anew; raise `IndexMismatchError` unless they give the stored vectors."""
    rows = np.sort(np.random.default_rng(_PROBE_SEED).permutation(stored.rows)[:_PROBES])
    texts = [corpus[int(row)].contents for row in rows]
    held = stored.vectors(rows)
    encoders = {other: Encoder(encoder_path, other) for other in EncoderFamily}
    made = {
        (other, kind): encoder.encode(texts, kind)
        for other, encoder in encoders.items()
        for kind in (TextKind.PASSAGE, TextKind.QUERY)
    }
    agreement = {treatment: _agreement(held, vectors) for treatment, vectors in made.items()}
    expected = (family, TextKind.PASSAGE)
    best_family, best_kind = best = max(agreement, key=lambda treatment: agreement[treatment])
    found = (
        f"{len(rows)} passages encoded by {encoder_path} as {family} give other vectors than the parts hold "
        f"(median cosine {agreement[expected]:.4f})"
    )
    if agreement[best] < _SAME:
        raise IndexMismatchError(f"{found}: {_reason(_shift(stored, rows, made[expected]))}")
    # Families that share a model's weights may differ by a prefix alone, and their vectors by very little.
    if agreement[best] > agreement[expected] + _ROUNDING:
        remedy = (
            f"give --encoder-family {best_family}"
            if best_kind is TextKind.PASSAGE
            else "they lack the passages' prefix, so queries would be compared with queries"
        )
        raise IndexMismatchError(
            f"{found}; they agree with how {best_family} treats a {best_kind} ({agreement[best]:.4f}): "
            f"{remedy}"
        )
    lengths = np.linalg.norm(held, axis=1)
    if np.abs(lengths - np.linalg.norm(made[expected], axis=1)).max() > 1 - _SAME:
        raise IndexMismatchError(
            f"the parts' vectors have lengths of {lengths.min():.3g} to {lengths.max():.3g} where the "
            "encoder makes 1: inner products would not rank them by angle"
        )


def _reason(shift: int | None) -> str:
    if shift is None:
        return "they were made by another encoder, or from another corpus"
    place = "after" if shift > 0 else "before"
    return (
        f"the vector of a passage lies {abs(shift)} rows {place} it, so the corpus is in another order, or "
        "the parts are"
    )


def _agreement(held: npt.NDArray[np.float32], made: npt.NDArray[np.float32]) -> float:
    """Median cosine of two sets of vectors [N, dim]."""
    lengths = np.linalg.norm(held, axis=1) * np.linalg.norm(made, axis=1)
    return float(np.median((held * made).sum(axis=1) / np.maximum(lengths, 1e-12)))


def _shift(stored: RowStore, rows: npt.NDArray[np.int64], made: npt.NDArray[np.float32]) -> int | None:
    """How many rows after its passage a vector lies, if most probes agree on that."""
    shifts = []
    for row, vector in zip(rows, made, strict=True):
        start = max(0, int(row) - _WINDOW)
        near = stored.vectors(slice(start, int(row) + _WINDOW + 1))
        cosines = near @ vector / np.maximum(np.linalg.norm(near, axis=1), 1e-12)
        if cosines.max() >= _SAME:
            shifts.append(start + int(cosines.argmax()) - int(row))
    common = max(set(shifts), key=shifts.count, default=0)
    return common if shifts.count(common) > len(rows) // 2 and common else None
