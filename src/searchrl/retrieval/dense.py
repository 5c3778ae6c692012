"""Dense retrieval: a sentence encoder, and vectors in a FAISS index or on GPUs.

Answers do not depend on how queries are batched. The index proposes more candidates than asked for; these are
scored again one query at a time, from the best vectors that the index has, and equal scores are ordered by
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from searchrl.retrieval.encoder import Encoder, TextKind
from searchrl.retrieval.flatfile import RowStore, faiss
from searchrl.retrieval.kinds import configure
from searchrl.retrieval.types import Hit

OVERFETCH = 16
"""Candidates beyond those asked for: rows that tie at the edge, and what rounding put a place too low."""
_RESULTS = 4
"""Results that a kind's number of ``candidates`` is meant for."""
_NEVER = 2**31 - 1


class VectorIndex(Protocol):
    """Vectors that can be searched for those with the largest inner product."""

    @property
    def size(self) -> int:
        """Number of vectors."""
        ...

    @property
    def dim(self) -> int:
        """Numbers of a vector."""
        ...

    def search(self, vectors: npt.NDArray[np.float32], top_k: int) -> list[list[Hit]]:
        """Return for each of ``vectors`` [N, dim] at most ``top_k`` hits, by falling score, then row."""
        ...


class DenseIndex:
    """Search over ``vectors`` with queries encoded by ``encoder``; `ValueError` if they differ in length."""

    def __init__(self, vectors: VectorIndex, encoder: Encoder) -> None:
        self._vectors = vectors
        self._encoder = encoder
        if vectors.dim != encoder.dim:
            raise ValueError(
                f"the index holds vectors of {vectors.dim} numbers, the encoder makes {encoder.dim}"
            )

    @property
    def size(self) -> int:
        """Number of vectors."""
        return self._vectors.size

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """See `Index.search`; the score is the inner product."""
        if not queries:
            return []
        return self._vectors.search(self._encoder.encode(queries, TextKind.QUERY), top_k)


class FaissVectors:
    """The FAISS index in the file ``path``, memory-mapped as far as its kind can be (all but FastScan).

    ``store`` is a file of flat or scalar-quantized vectors that candidates are scored from. ``search`` holds
    the kind's search-time parameters. ``gpus``, numbers of CUDA devices, puts the index on these.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        store: str | Path | None = None,
        search: dict[str, int] | None = None,
        gpus: Sequence[int] = (),
    ) -> None:
        library = faiss()
        self._index = library.read_index(str(path), library.IO_FLAG_MMAP_IFC)
        parameters = search or {}
        configure(self._index, parameters)
        self._candidates = parameters.get("candidates", 0)
        self._store = None if store is None else RowStore(store)
        # FAISS's own scores of inverted lists and RaBitQ need no second computation: they are made per query,
        # and RaBitQ's are better than those of its decoded vectors.
        inner = _inner(self._index)
        self._inverted = isinstance(inner, library.IndexIVF)
        self._final = self._inverted or "RaBitQ" in type(inner).__name__ or bool(gpus)
        if gpus:
            self._index = _on_gpus(self._index, gpus)

    @property
    def size(self) -> int:
        """Number of vectors."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Numbers of a vector."""
        return int(self._index.d)

    def search(self, vectors: npt.NDArray[np.float32], top_k: int) -> list[list[Hit]]:
        """See `VectorIndex.search`."""
        # Above this nq * d FAISS multiplies matrices. Since 1.15 its default is 128,000, at which a batch of
        # queries is scanned one by one and batching gains nothing. Which lists a query looks into must not
        # depend on the batch's rounding, and choosing them is a small part of the work.
        faiss().cvar.distance_compute_blas_threshold = _NEVER if self._inverted else 4 * self.dim
        wanted = max(top_k + OVERFETCH, self._candidates * max(_RESULTS, top_k) // _RESULTS)
        scores, rows = self._index.search(vectors, min(wanted, self.size))
        results = []
        for vector, own_scores, found in zip(vectors, scores, rows, strict=True):
            there = found >= 0  # -1 fills the places of results that FAISS did not have
            candidates, own = found[there], own_scores[there]
            if self._store is not None:
                results.append(rescore(vector, candidates, self._store.vectors, top_k))
            elif self._final:
                results.append(ranked(candidates, own, top_k))
            else:
                results.append(rescore(vector, candidates, self._index.reconstruct_batch, top_k))
        return results


def rescore(
    vector: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], fetch: Any, top_k: int
) -> list[Hit]:
    """Rank candidate ``rows`` of one query [dim] by inner products with the vectors of ``fetch(rows)``."""
    rows = np.sort(rows)
    if not len(rows):
        return []
    stored: npt.NDArray[np.float32] = fetch(rows)
    return ranked(rows, (stored * vector).sum(axis=1), top_k)


def ranked(rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float32], top_k: int) -> list[Hit]:
    """Return the ``top_k`` best of the ``rows``, by falling score, equal scores by rising row."""
    best = np.lexsort((rows, -scores))[:top_k]
    return [Hit(int(rows[i]), float(scores[i])) for i in best]


def _inner(index: Any) -> Any:
    library = faiss()
    return library.downcast_index(index.index) if isinstance(index, library.IndexPreTransform) else index


def _on_gpus(index: Any, gpus: Sequence[int]) -> Any:
    """Split the index over GPUs, vectors in fp16."""
    library = faiss()
    options = library.GpuMultipleClonerOptions()
    options.shard = len(gpus) > 1
    options.useFloat16 = True
    resources = [library.StandardGpuResources() for _ in gpus]
    return library.index_cpu_to_gpu_multiple_py(resources, index, options, list(gpus))
