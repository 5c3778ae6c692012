"""Dense retrieval: a sentence encoder and an exact FAISS inner-product index.

Answers do not depend on how queries are batched: a few more candidates than asked for are taken from FAISS
and rescored one query at a time, and equal scores are ordered by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchrl.retrieval.encoder import Encoder, TextKind
from searchrl.retrieval.types import Hit

_OVERFETCH = 16


def _faiss() -> Any:
    """Import FAISS, which has no types."""
    return import_module("faiss")


class DenseIndex:
    """Exact search over the vectors in the file ``path``, queries encoded by ``encoder``.

    The file is memory-mapped. Raises `ValueError` if its dimension is not the encoder's.
    """

    def __init__(self, path: str | Path, encoder: Encoder) -> None:
        faiss = _faiss()
        self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        self._encoder = encoder
        if self._index.d != encoder.dim:
            raise ValueError(
                f"{path} holds vectors of {self._index.d} numbers, the encoder makes {encoder.dim}"
            )
        # Above this nq * d FAISS multiplies matrices. Since 1.15 its default is 128,000, at which a batch of
        # queries is scanned one by one and batching gains nothing.
        faiss.cvar.distance_compute_blas_threshold = 4 * self._index.d

    @property
    def size(self) -> int:
        """Number of vectors."""
        return int(self._index.ntotal)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """See `Index.search`; the score is the inner product."""
        if not queries:
            return []
        vectors = self._encoder.encode(queries, TextKind.QUERY)
        _, rows = self._index.search(vectors, min(top_k + _OVERFETCH, self.size))
        return [self._rescore(vector, found, top_k) for vector, found in zip(vectors, rows, strict=True)]

    def _rescore(
        self, vector: npt.NDArray[np.float32], found: npt.NDArray[np.int64], top_k: int
    ) -> list[Hit]:
        """Order the candidate rows ``found`` of one query [dim] by exact score, then row."""
        rows = np.sort(found[found >= 0])  # -1 fills the places of results that FAISS did not have
        candidates: npt.NDArray[np.float32] = self._index.reconstruct_batch(rows)
        scores = (candidates * vector).sum(axis=1)
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [Hit(int(rows[i]), float(scores[i])) for i in best]


def write_flat(path: str | Path, vectors: npt.NDArray[np.float32]) -> None:
    """Write an exact inner-product index over ``vectors`` [rows, dim] to ``path``."""
    faiss = _faiss()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    faiss.write_index(index, str(path))
