"""Reciprocal rank fusion: combine indexes by the ranks they give, whatever their scores mean.

``score(row) = sum over indexes of weight / (60 + rank)``, ranks from 1; an index that did not return the row
adds nothing. 60 is the constant of Cormack, Clarke and Büttcher (SIGIR 2009).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from searchrl.retrieval.types import Hit, Index

RRF_K = 60


class HybridIndex:
    """Several indexes over the same corpus, fused by rank.

    ``depth`` candidates are taken from each index (``top_k`` if that is more). Raises `ValueError` if the
    indexes differ in size or ``weights`` has another length.
    """

    def __init__(
        self, indexes: Sequence[Index], *, depth: int = 100, weights: Sequence[float] | None = None
    ) -> None:
        sizes = {index.size for index in indexes}
        if len(sizes) != 1:
            raise ValueError(f"indexes to fuse must cover the same corpus; their sizes are {sorted(sizes)}")
        self._indexes = list(indexes)
        self._depth = depth
        self._weights = [1.0] * len(self._indexes) if weights is None else list(weights)
        if len(self._weights) != len(self._indexes):
            raise ValueError(f"{len(self._weights)} weights for {len(self._indexes)} indexes")

    @property
    def size(self) -> int:
        """Number of corpus rows."""
        return self._indexes[0].size

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """See `Index.search`; the score is the fused one."""
        depth = max(self._depth, top_k)
        per_index = [index.search(queries, depth) for index in self._indexes]
        return [fuse([hits[i] for hits in per_index], self._weights, top_k) for i in range(len(queries))]


def fuse(rankings: Sequence[Sequence[Hit]], weights: Sequence[float], top_k: int) -> list[Hit]:
    """Fuse the rankings of one query; equal scores by rising row."""
    parts: dict[int, list[float]] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for rank, hit in enumerate(ranking, start=1):
            parts.setdefault(hit.row, []).append(weight / (RRF_K + rank))
    # fsum rounds once, so rows with the same ranks in another order of indexes tie exactly.
    fused = [Hit(row, math.fsum(values)) for row, values in parts.items()]
    return sorted(fused, key=lambda hit: (-hit.score, hit.row))[:top_k]
