"""Make, describe and open indexes: a folder with its files and a ``manifest.json`` that ties them together.

The manifest names the corpus (SHA-256, rows) and the encoder (hash of its weights, prefixes, pooling) that an
index was made from. `load_index` refuses any other; `build_index` does nothing if all is as it should be.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from searchrl.config import IndexKind
from searchrl.errors import SearchrlError
from searchrl.retrieval.bm25 import K1, STEMMER, STOPWORDS, B, Bm25Index, write_bm25
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.dense import DenseIndex, write_flat
from searchrl.retrieval.encoder import SPECS, Encoder, EncoderFamily, TextKind, weights_fingerprint
from searchrl.retrieval.hybrid import HybridIndex
from searchrl.retrieval.types import Index

FORMAT = 1
_MANIFEST = "manifest.json"
_BM25 = "bm25"
_DENSE = "dense.faiss"
_HASHED_ON_LOAD = 256 << 20
"""Files up to this many bytes are hashed when an index is opened; of larger ones only the size is checked."""


class IndexMismatchError(SearchrlError, ValueError):
    """An index does not belong to the corpus, encoder or files it is opened with."""


@dataclass(kw_only=True, slots=True, frozen=True)
class EncoderRecord:
    """The encoder an index was made with."""

    path: str
    """Where it was, relative to the index; for finding it again, not part of its identity."""
    family: str
    fingerprint: str
    """`encoder.weights_fingerprint`."""
    query_prefix: str
    passage_prefix: str
    pooling: str
    max_length: int
    normalize: bool


@dataclass(kw_only=True, slots=True, frozen=True)
class FileRecord:
    """A file of the index."""

    size: int
    sha256: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Manifest:
    """All that ties an index together. Written as ``manifest.json``."""

    format: int
    kind: str
    corpus_sha256: str
    rows: int
    encoder: EncoderRecord | None
    dim: int | None
    metric: str | None
    bm25: dict[str, float | str] | None
    files: dict[str, FileRecord]
    versions: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over everything that decides an answer; independent of paths and versions."""
        record = asdict(self)
        del record["versions"]
        if self.encoder is not None:
            del record["encoder"]["path"]
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: str | Path) -> Manifest:
    """Read the manifest of an index; raise `IndexMismatchError` if there is none or it cannot be read."""
    path = Path(directory) / _MANIFEST
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        encoder = record["encoder"]
        record["encoder"] = None if encoder is None else EncoderRecord(**encoder)
        record["files"] = {name: FileRecord(**file) for name, file in record["files"].items()}
        manifest = Manifest(**record)
    except FileNotFoundError as error:
        raise IndexMismatchError(f"no index at {directory}: build one with build_index") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexMismatchError(
            f"{path} cannot be read ({error}): delete the index and build it anew"
        ) from error
    if manifest.format != FORMAT:
        raise IndexMismatchError(
            f"{path} has format {manifest.format}, this version reads {FORMAT}: build it anew"
        )
    return manifest


def build_index(
    corpus_path: str | Path,
    directory: str | Path,
    *,
    kind: IndexKind,
    encoder_path: Path | None = None,
    encoder_family: EncoderFamily = EncoderFamily.MINILM,
    batch_size: int = 32,
    progress: bool = True,
) -> Manifest:
    """Index a corpus into ``directory``, which appears complete or not at all; return its manifest.

    Does nothing if ``directory`` already holds this index. ``encoder_path`` is needed for dense and hybrid.
    ``progress`` shows a bar when standard error is a terminal. Raises `CorpusError` naming the line of a
    malformed passage, and `ValueError` if ``directory`` holds something that is no index.
    """
    directory = Path(directory).absolute()
    corpus = Corpus(corpus_path)
    if (kind is not IndexKind.bm25) != (encoder_path is not None):
        raise ValueError(f"encoder_path is needed for dense and hybrid indexes only; kind is {kind}")
    record = None if encoder_path is None else _encoder_record(encoder_path, encoder_family, directory)
    if directory.exists() and any(directory.iterdir()):
        existing = _existing(directory, corpus, kind, record)
        if existing is not None:
            return existing
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        texts = [corpus[row].contents for row in range(len(corpus))]
        if kind is not IndexKind.dense:
            write_bm25(temporary / _BM25, texts)
        dim = None
        if encoder_path is not None:
            encoder = Encoder(
                encoder_path, encoder_family, batch_size=batch_size, threads=len(os.sched_getaffinity(0))
            )
            dim = encoder.dim
            with _advance(len(texts), progress) as on_progress:
                vectors = encoder.encode(texts, TextKind.PASSAGE, on_progress=on_progress)
            write_flat(temporary / _DENSE, vectors)
        manifest = _describe(temporary, corpus, kind, record, dim)
        (temporary / _MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        _swap(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def load_index(directory: str | Path, corpus: Corpus, *, encoder_path: Path | None = None) -> Index:
    """Open an index for searching ``corpus``.

    The encoder is looked for where it was when the index was made, or in ``encoder_path``. Raises
    `IndexMismatchError` naming both hashes and the remedy if corpus, encoder or files are not those of the
    manifest.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest.corpus_sha256 != corpus.sha256:
        raise IndexMismatchError(
            f"the index {directory} was built from a corpus with SHA-256 {manifest.corpus_sha256} "
            f"({manifest.rows} passages), but {corpus.path} has {corpus.sha256} ({len(corpus)} passages): "
            "give the corpus it was built from, or build the index anew"
        )
    _check_files(directory, manifest)
    indexes: list[Index] = []
    if manifest.bm25 is not None:
        indexes.append(Bm25Index(directory / _BM25))
    if manifest.encoder is not None:
        indexes.append(
            DenseIndex(directory / _DENSE, _load_encoder(directory, manifest.encoder, encoder_path))
        )
    for index in indexes:
        if index.size != manifest.rows:
            raise IndexMismatchError(
                f"{directory} covers {index.size} of {manifest.rows} passages: build it anew"
            )
    return indexes[0] if len(indexes) == 1 else HybridIndex(indexes)


def _load_encoder(directory: Path, record: EncoderRecord, encoder_path: Path | None) -> Encoder:
    path = encoder_path if encoder_path is not None else directory.absolute() / record.path
    if not (path / "config.json").is_file():
        raise IndexMismatchError(
            f"the encoder of {directory} ({record.family}, {record.fingerprint}) is not at {path}: "
            "give its folder as encoder_path"
        )
    found = weights_fingerprint(path)
    if found != record.fingerprint:
        raise IndexMismatchError(
            f"the index {directory} was made with encoder {record.fingerprint} ({record.family}), but {path} "
            f"is {found}: give the encoder it was made with as encoder_path, or build the index anew"
        )
    if record != _encoder_record(path, EncoderFamily(record.family), directory, as_path=record.path):
        raise IndexMismatchError(
            f"this version treats texts for {record.family} otherwise than the one that made {directory}: "
            "build the index anew"
        )
    return Encoder(path, EncoderFamily(record.family))


def _encoder_record(
    path: Path, family: EncoderFamily, directory: Path, *, as_path: str | None = None
) -> EncoderRecord:
    spec = SPECS[family]
    return EncoderRecord(
        path=os.path.relpath(path, directory) if as_path is None else as_path,
        family=family.value,
        fingerprint=weights_fingerprint(path),
        query_prefix=spec.query_prefix,
        passage_prefix=spec.passage_prefix,
        pooling=spec.pooling.value,
        max_length=spec.max_length,
        normalize=spec.normalize,
    )


def _describe(
    folder: Path, corpus: Corpus, kind: IndexKind, encoder: EncoderRecord | None, dim: int | None
) -> Manifest:
    """Return the manifest of the index files in ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parameters: dict[str, float | str] = {"k1": K1, "b": B, "stemmer": STEMMER, "stopwords": STOPWORDS}
    return Manifest(
        format=FORMAT,
        kind=kind.value,
        corpus_sha256=corpus.sha256,
        rows=len(corpus),
        encoder=encoder,
        dim=dim,
        metric=None if encoder is None else "inner_product",
        bm25=None if kind is IndexKind.dense else parameters,
        files={
            str(f.relative_to(folder)): FileRecord(size=f.stat().st_size, sha256=_sha256(f)) for f in files
        },
        versions={name: version(name) for name in ("bm25s", "numpy", "transformers", "torch")},
    )


def _existing(
    directory: Path, corpus: Corpus, kind: IndexKind, encoder: EncoderRecord | None
) -> Manifest | None:
    """Return the manifest of ``directory`` if it is the wanted index, None if it is to be replaced."""
    if not (directory / _MANIFEST).is_file():
        raise ValueError(f"{directory} is not empty and holds no index: choose another directory")
    try:
        manifest = read_manifest(directory)
        _check_files(directory, manifest)
    except IndexMismatchError:
        return None
    wanted = (kind.value, corpus.sha256, None if encoder is None else {**asdict(encoder), "path": ""})
    held = manifest.encoder
    found = (manifest.kind, manifest.corpus_sha256, None if held is None else {**asdict(held), "path": ""})
    return manifest if wanted == found else None


def _check_files(directory: Path, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != record.size:
            raise IndexMismatchError(
                f"{path} has {size} bytes, its manifest says {record.size}: build the index anew"
            )
        if record.size <= _HASHED_ON_LOAD and (found := _sha256(path)) != record.sha256:
            raise IndexMismatchError(
                f"{path} has SHA-256 {found}, its manifest says {record.sha256}: build the index anew"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _swap(temporary: Path, directory: Path) -> None:
    """Put ``temporary`` in the place of ``directory``; a folder cannot be renamed over a full one."""
    old = directory.with_name(f"{temporary.name}.old")
    if directory.exists():
        directory.rename(old)
    temporary.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _advance(total: int, progress: bool) -> Iterator[Any]:
    """Yield a function that advances a progress bar by the texts finished, or None where there is no bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (progress and console.is_terminal):
        yield None
        return
    columns = (TextColumn("encoding passages"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)
