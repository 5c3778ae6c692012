"""Build an index: encode (or resume), write the dense part of the wanted kind, write BM25, tie them together.

Work goes on in ``.NAME.partial`` beside the target, which appears complete or not at all. The encoded vectors
in there outlive a failure or a kill; the next build of the same index goes on from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from searchrl.config import IndexKind
from searchrl.retrieval.bm25 import K1, STEMMER, STOPWORDS, B, write_bm25
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.dense_build import dense_bytes, require_space, write_dense
from searchrl.retrieval.devices import gpu_numbers
from searchrl.retrieval.encoder import EncoderFamily, encoder_dim
from searchrl.retrieval.encoding import SHARD_ROWS, EncodeJob, encode_corpus
from searchrl.retrieval.kinds import DenseKind, resolve_kind
from searchrl.retrieval.manifest import (
    BM25,
    FORMAT,
    DenseRecord,
    EncoderRecord,
    IndexMismatchError,
    Manifest,
    check_files,
    identity,
    installed_versions,
    is_index,
    put_in_place,
    read_manifest,
    record_encoder,
    record_files,
)
from searchrl.retrieval.progress import progress as show_progress
from searchrl.retrieval.progress import say
from searchrl.retrieval.unpack import unpacked
from searchrl.retrieval.workspace import workspace

METRIC = "inner_product"


def build_index(
    corpus_path: str | Path,
    directory: str | Path,
    *,
    kind: IndexKind,
    encoder_path: Path | None = None,
    encoder_family: EncoderFamily = EncoderFamily.MINILM,
    dense_index: str = "flat",
    devices: Sequence[str] = ("cpu",),
    processes: int = 1,
    batch_size: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Index a corpus into ``directory``; return its manifest.

    Does nothing if ``directory`` already holds this index. ``encoder_path`` is needed for dense and hybrid,
    ``dense_index`` names their `kinds`. The corpus is encoded on ``devices``: by one process for each GPU, or
    on the CPU by ``processes``, which share the cores. ``progress`` shows a bar, or lines where there is no
    terminal. Memory is bounded for the dense part (`kinds.Cost.building`); BM25 takes about 0.6 kB a passage.

    Raises:
        CorpusError: a malformed passage; the message names its line.
        BuildError: an unknown kind, no space on the disk, a dead worker, a target that holds something else.
        DeviceError: devices that are no such thing.
    """
    directory = Path(directory).absolute()
    if (kind is not IndexKind.bm25) != (encoder_path is not None):
        raise ValueError(f"encoder_path is needed for dense and hybrid indexes only; kind is {kind}")
    gpu_numbers(devices)
    corpus = Corpus(unpacked(Path(corpus_path)))
    record, wanted = None, None
    if encoder_path is not None:
        record = record_encoder(encoder_path, encoder_family, directory)
        wanted = resolve_kind(dense_index, rows=len(corpus), dim=encoder_dim(encoder_path))
    existing = _existing(directory, corpus, kind, record, wanted)
    if existing is not None:
        return existing
    key = {"corpus": corpus.sha256, "encoder": identity(record)}
    with workspace(directory, key) as work:
        finished = work / "index"
        finished.mkdir()
        if encoder_path is not None and wanted is not None:
            job = EncodeJob(
                corpus=corpus.path,
                rows=len(corpus),
                dim=wanted.dim,
                encoder=encoder_path,
                family=encoder_family,
                batch_size=batch_size,
                vectors=work / "vectors.faiss",
            )
            _encode(job, corpus, wanted, devices, processes, progress)
            write_dense(job.vectors, wanted, finished, progress=progress)
        if kind is not IndexKind.dense:
            _write_bm25(corpus, finished / BM25, progress)
        manifest = describe(finished, corpus, kind, record, wanted)
        manifest.write(finished)
        put_in_place(finished, directory)
    return manifest


def _write_bm25(corpus: Corpus, folder: Path, progress: bool) -> None:
    texts = (corpus[row].contents for row in range(len(corpus)))
    with show_progress("BM25", len(corpus), enabled=progress) as on_rows:
        write_bm25(folder, texts, on_rows=on_rows)


def _encode(
    job: EncodeJob, corpus: Corpus, kind: DenseKind, devices: Sequence[str], processes: int, progress: bool
) -> None:
    """Bring the vectors to the disk."""
    held = job.vectors.stat().st_blocks * 512 if job.vectors.exists() else 0  # it has holes until it is full
    vectors = max(0, 4 * job.rows * job.dim - held)
    needed = vectors + dense_bytes(kind, rows=job.rows, linked=True)
    require_space(job.vectors.parent, needed, f"encoding {job.rows:,} passages for {kind.name}")
    if not job.finished():
        # A malformed line far down would be found hours later, and mending it makes this another corpus.
        with show_progress("check passages", job.rows, enabled=progress) as on_rows:
            for row in range(job.rows):
                corpus[row]
                on_rows(1)
    done = min(job.rows, len(job.finished()) * SHARD_ROWS)
    if done:
        say(f"going on after {done:,} passages that an earlier build encoded")
    with show_progress("encode passages", job.rows, done=done, enabled=progress) as on_rows:
        encode_corpus(job, devices=devices, processes=processes, on_rows=on_rows)


def describe(
    folder: Path,
    corpus: Corpus,
    kind: IndexKind,
    encoder: EncoderRecord | None,
    dense: DenseKind | None,
    *,
    known: dict[str, str] | None = None,
) -> Manifest:
    """Return the manifest of the index files in ``folder``; ``known`` SHA-256 are not computed again."""
    parameters: dict[str, float | str] = {"k1": K1, "b": B, "stemmer": STEMMER, "stopwords": STOPWORDS}
    return Manifest(
        format=FORMAT,
        kind=kind.value,
        corpus_sha256=corpus.sha256,
        rows=len(corpus),
        encoder=encoder,
        dim=None if dense is None else dense.dim,
        metric=None if dense is None else METRIC,
        dense=None if dense is None else dense_record(dense),
        bm25=None if kind is IndexKind.dense else parameters,
        files=record_files(folder, known),
        versions=installed_versions(),
    )


def dense_record(kind: DenseKind) -> DenseRecord:
    """The manifest's record of a kind."""
    return DenseRecord(index=kind.name, factory=kind.factory, store=kind.store, search=kind.search)


def _existing(
    directory: Path, corpus: Corpus, kind: IndexKind, encoder: EncoderRecord | None, dense: DenseKind | None
) -> Manifest | None:
    """Return the manifest of ``directory`` if it is the wanted index, None if it is to be made."""
    if not is_index(directory):
        return None
    try:
        manifest = read_manifest(directory)
        check_files(directory, manifest)
    except IndexMismatchError:
        return None
    record = None if dense is None else dense_record(dense)
    wanted = (kind.value, corpus.sha256, identity(encoder), record)
    found = (manifest.kind, manifest.corpus_sha256, identity(manifest.encoder), manifest.dense)
    return manifest if wanted == found else None
