"""Open an index for searching, and refuse one that does not belong to corpus, encoder or files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from searchrl.retrieval.bm25 import Bm25Index
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.dense import DenseIndex, FaissVectors, VectorIndex
from searchrl.retrieval.devices import DeviceError, gpu_numbers
from searchrl.retrieval.encoder import Encoder, EncoderFamily
from searchrl.retrieval.flatfile import faiss
from searchrl.retrieval.hybrid import HybridIndex
from searchrl.retrieval.manifest import (
    BM25,
    DENSE,
    STORE,
    DenseRecord,
    EncoderRecord,
    IndexMismatchError,
    check_files,
    read_manifest,
    record_encoder,
)
from searchrl.retrieval.torch_flat import TorchVectors
from searchrl.retrieval.types import Index

_FAISS_GPU = re.compile(r"IVF\d+,(Flat|SQ8|SQfp16|PQ\d+(np)?)")
"""What FAISS can search on GPUs, beside the exact kinds."""


def load_index(
    directory: str | Path,
    corpus: Corpus,
    *,
    encoder_path: Path | None = None,
    devices: Sequence[str] = ("cpu",),
) -> Index:
    """Open an index for searching ``corpus``.

    The encoder is looked for where it was when the index was made, or in ``encoder_path``. ``devices`` is the
    CPU, or GPUs (``cuda:0``, …): the encoder goes to the first of them, the vectors are split over all; BM25
    stays on the CPU.

    Raises:
        IndexMismatchError: corpus, encoder or files are not those of the manifest; names both and the remedy.
        DeviceError: this kind of index, or this FAISS, does not work on these devices.
    """
    gpu_numbers(devices)  # a wrong name is refused for BM25 too, which would ignore it
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest.corpus_sha256 != corpus.sha256:
        raise IndexMismatchError(
            f"the index {directory} was built from a corpus with SHA-256 {manifest.corpus_sha256} "
            f"({manifest.rows} passages), but {corpus.path} has {corpus.sha256} ({len(corpus)} passages): "
            "give the corpus it was built from, or build the index anew"
        )
    check_files(directory, manifest)
    indexes: list[Index] = []
    if manifest.bm25 is not None:
        indexes.append(Bm25Index(directory / BM25))
    if manifest.encoder is not None and manifest.dense is not None:
        vectors = open_vectors(directory, manifest.dense, devices)
        encoder = load_encoder(directory, manifest.encoder, encoder_path, devices[0])
        indexes.append(DenseIndex(vectors, encoder))
    for index in indexes:
        if index.size != manifest.rows:
            raise IndexMismatchError(
                f"{directory} covers {index.size} of {manifest.rows} passages: build it anew"
            )
    return indexes[0] if len(indexes) == 1 else HybridIndex(indexes)


def open_vectors(directory: Path, dense: DenseRecord, devices: Sequence[str]) -> VectorIndex:
    """Open the dense part of an index; see `load_index`."""
    gpus = gpu_numbers(devices)
    store = None if dense.store is None else directory / STORE
    if not gpus:
        return FaissVectors(directory / DENSE, store=store, search=dense.search)
    if store is None and dense.factory in ("Flat", "SQfp16"):
        return TorchVectors(directory / DENSE, devices=devices)
    remedy = "choose devices [cpu], or a flat or fp16 index, which need no FAISS on the GPU"
    if store is not None or not _FAISS_GPU.fullmatch(dense.factory):
        raise DeviceError(f"{dense.index} cannot be searched on GPUs: {remedy}")
    if not hasattr(faiss(), "StandardGpuResources") or not faiss().get_num_gpus():
        raise DeviceError(
            f"{dense.index} on GPUs needs the package faiss-gpu in the place of faiss-cpu, and a GPU: "
            f"install it, or {remedy}"
        )
    return FaissVectors(directory / DENSE, search=dense.search, gpus=gpus)


def load_encoder(directory: Path, record: EncoderRecord, encoder_path: Path | None, device: str) -> Encoder:
    """Load the encoder of the index in ``directory``; raise `IndexMismatchError` if it is another one."""
    path = encoder_path if encoder_path is not None else directory.absolute() / record.path
    if not (path / "config.json").is_file():
        raise IndexMismatchError(
            f"the encoder of {directory} ({record.family}, {record.fingerprint}) is not at {path}: "
            "give its folder as encoder_path"
        )
    family = EncoderFamily(record.family)
    found = record_encoder(path, family, directory, as_path=record.path)
    if found.fingerprint != record.fingerprint:
        raise IndexMismatchError(
            f"the index {directory} was made with encoder {record.fingerprint} ({record.family}), but {path} "
            f"is {found.fingerprint}: give the encoder it was made with as encoder_path, or build the index "
            "anew"
        )
    if found != record:
        raise IndexMismatchError(
            f"this version treats texts for {record.family} otherwise than the one that made {directory}: "
            "build the index anew"
        )
    return Encoder(path, family, device=device)
