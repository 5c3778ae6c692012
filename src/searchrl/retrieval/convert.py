"""Make another kind of dense index from one that has exact vectors, without encoding anything again."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from searchrl.retrieval.build import dense_record
from searchrl.retrieval.dense_build import dense_bytes, link, require_space, write_dense
from searchrl.retrieval.kinds import resolve_kind
from searchrl.retrieval.manifest import (
    BM25,
    DENSE,
    STORE,
    BuildError,
    DenseRecord,
    IndexMismatchError,
    Manifest,
    check_files,
    installed_versions,
    is_index,
    put_in_place,
    read_manifest,
    record_files,
)
from searchrl.retrieval.workspace import workspace


def flat_vectors(directory: Path) -> tuple[Manifest, Path]:
    """The manifest of an index, and its file of exact vectors; raises `IndexMismatchError` if it has none."""
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    match manifest.dense:
        case DenseRecord(factory="Flat"):
            return manifest, directory / DENSE
        case DenseRecord(store="Flat"):
            return manifest, directory / STORE
    held = manifest.kind if manifest.dense is None else manifest.dense.index
    raise IndexMismatchError(
        f"{directory} is {held} and has no exact vectors: build a flat index, or convert the one it came from"
    )


def convert_index(
    source: str | Path, directory: str | Path, *, dense_index: str, progress: bool = True
) -> Manifest:
    """Write ``source`` with its dense part as ``dense_index`` to ``directory``; return the manifest.

    Files that stay the same are shared with ``source`` where the file system can. Raises `IndexMismatchError`
    if ``source`` has no exact vectors, `BuildError` for an unknown kind, no space, or a full ``directory``.
    """
    source, directory = Path(source).absolute(), Path(directory).absolute()
    if is_index(directory):
        raise BuildError(f"{directory} holds an index already: remove it, or choose another directory")
    manifest, flat = flat_vectors(source)
    assert manifest.dim is not None
    assert manifest.encoder is not None
    kind = resolve_kind(dense_index, rows=manifest.rows, dim=manifest.dim)
    known = {}
    if "Flat" in (kind.factory, kind.store):
        known[DENSE if kind.factory == "Flat" else STORE] = manifest.files[flat.name].sha256
    with workspace(directory, {"convert": manifest.fingerprint}) as work:
        shared = work.stat().st_dev == flat.stat().st_dev
        require_space(work, dense_bytes(kind, rows=manifest.rows, linked=shared), f"writing {dense_index}")
        finished = work / "index"
        finished.mkdir()
        write_dense(flat, kind, finished, progress=progress)
        if manifest.bm25 is not None:
            shutil.copytree(source / BM25, finished / BM25, copy_function=lambda a, b: link(Path(a), Path(b)))
        encoder = os.path.relpath(source / manifest.encoder.path, directory)
        made = replace(
            manifest,
            dense=dense_record(kind),
            encoder=replace(manifest.encoder, path=encoder),
            files=record_files(finished, known),
            versions=installed_versions(),
        )
        made.write(finished)
        put_in_place(finished, directory)
    return made
