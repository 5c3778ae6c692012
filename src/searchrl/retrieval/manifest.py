"""What an index says about itself: ``manifest.json`` ties its files to a corpus and an encoder.

The manifest names the corpus (SHA-256, rows), the encoder (hash of its weights, prefixes, pooling) and how
vectors are held. Its fingerprint stands for everything that decides an answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from searchrl.errors import InputError, SearchrlError
from searchrl.retrieval.encoder import SPECS, EncoderFamily, weights_fingerprint

FORMAT = 2
MANIFEST = "manifest.json"
BM25 = "bm25"
"""Folder of the BM25 part."""
DENSE = "dense.faiss"
"""The FAISS index."""
STORE = "store.faiss"
"""Vectors that candidates are rescored from, if the dense index is too coarse to rank by."""
_HASHED_ON_LOAD = 256 << 20
"""Files up to this many bytes are hashed when an index is opened; of larger ones only the size is checked."""
_LIBRARIES = ("bm25s", "faiss-cpu", "faiss-gpu", "numpy", "torch", "transformers")


class IndexMismatchError(InputError, ValueError):
    """An index does not belong to the corpus, encoder or files it is opened with."""


class BuildError(SearchrlError, RuntimeError):
    """An index cannot be made: a worker died, no space on the disk, a target that is something else."""


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
class DenseRecord:
    """How vectors are held and searched: a resolved `kinds.DenseKind`."""

    index: str
    """The name that was asked for."""
    factory: str
    """FAISS's description of ``dense.faiss``."""
    store: str | None
    """FAISS's description of ``store.faiss``."""
    search: dict[str, int]
    """Search-time parameters: ``nprobe``, ``efSearch``, ``candidates``."""


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
    dense: DenseRecord | None
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

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_manifest(directory: str | Path) -> Manifest:
    """Read the manifest of an index; raise `IndexMismatchError` if there is none or it cannot be read."""
    path = Path(directory) / MANIFEST
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if record.get("format") != FORMAT:
            raise IndexMismatchError(
                f"{path} has format {record.get('format')}, this version reads {FORMAT}: build it anew"
            )
        if record["encoder"] is not None:
            record["encoder"] = EncoderRecord(**record["encoder"])
        if record["dense"] is not None:
            record["dense"] = DenseRecord(**record["dense"])
        record["files"] = {name: FileRecord(**file) for name, file in record["files"].items()}
        return Manifest(**record)
    except FileNotFoundError as error:
        raise IndexMismatchError(f"no index at {directory}: make one with `searchrl index build`") from error
    except IndexMismatchError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexMismatchError(
            f"{path} cannot be read ({error}): delete the index and build it anew"
        ) from error


def record_encoder(
    path: Path, family: EncoderFamily, directory: Path, *, as_path: str | None = None
) -> EncoderRecord:
    """Describe the encoder in ``path`` for an index in ``directory``."""
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


def identity(encoder: EncoderRecord | None) -> dict[str, Any] | None:
    """What makes two encoder records the same encoder: all but where it lies."""
    return None if encoder is None else {**asdict(encoder), "path": ""}


def record_files(folder: Path, known: dict[str, str] | None = None) -> dict[str, FileRecord]:
    """Size and SHA-256 of all files under ``folder``; ``known`` hashes are not computed again."""
    known = known or {}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        (name := str(file.relative_to(folder))): FileRecord(
            size=file.stat().st_size, sha256=known.get(name) or _sha256(file)
        )
        for file in files
    }


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that had a hand in an index; for the curious, not part of its identity."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # faiss comes from one of two packages
    return found


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raise `IndexMismatchError` unless the files are those that the manifest describes."""
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


def is_index(directory: Path) -> bool:
    """Whether there is an index, of any version; raises `BuildError` if there is something else."""
    if not directory.exists() or not any(directory.iterdir()):
        return False
    if not (directory / MANIFEST).is_file():
        raise BuildError(f"{directory} is not empty and holds no index: choose another directory")
    return True


def put_in_place(finished: Path, directory: Path) -> None:
    """Rename ``finished`` to ``directory``, replacing what is there: complete or not at all."""
    old = finished.with_name(f"{finished.name}.old")  # a folder cannot be renamed over a full one
    if directory.exists():
        directory.rename(old)
    finished.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
