"""Exact search on GPUs with torch alone: a matrix product and a top-k over vectors in fp16.

The fp16 products only propose candidates, which are scored from the index file as on the CPU; so answers are
the same as FAISS's flat index gives, unless more than `kinds.CANDIDATES` vectors lie within fp16's rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from searchrl.retrieval.dense import rescore
from searchrl.retrieval.flatfile import RowStore
from searchrl.retrieval.kinds import CANDIDATES
from searchrl.retrieval.types import Hit

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 17
"""Rows multiplied at once: 64 MiB of scores for 128 queries."""


class TorchVectors:
    """The vectors of a flat or fp16 index file, split over ``devices`` in equal parts."""

    def __init__(self, path: str | Path, *, devices: Sequence[str], block: int = _BLOCK) -> None:
        self._store = RowStore(path)
        self._block = block
        bounds = [round(part * self.size / len(devices)) for part in range(len(devices) + 1)]
        self._shards = [
            _Shard(self._store, start, stop, device, block)
            for device, start, stop in zip(devices, bounds[:-1], bounds[1:], strict=True)
        ]

    @property
    def size(self) -> int:
        """Number of vectors."""
        return self._store.rows

    @property
    def dim(self) -> int:
        """Numbers of a vector."""
        return self._store.dim

    def search(self, vectors: npt.NDArray[np.float32], top_k: int) -> list[list[Hit]]:
        """See `dense.VectorIndex.search`."""
        wanted = max(CANDIDATES, 4 * top_k)
        pending = [shard.candidates(vectors, wanted) for shard in self._shards]  # GPUs work at the same time
        rows = np.concatenate([found.cpu().numpy() for found in pending], axis=1)
        return [
            rescore(vector, found, self._store.vectors, top_k)
            for vector, found in zip(vectors, rows, strict=True)
        ]


class _Shard:
    """Rows ``start`` to ``stop`` on one device."""

    def __init__(self, store: RowStore, start: int, stop: int, device: str, block: int) -> None:
        import torch

        dtype = {4 * store.dim: np.float32, 2 * store.dim: np.float16}[store.codes.shape[1]]
        self._start = start
        self._vectors = torch.empty((stop - start, store.dim), dtype=torch.float16, device=device)
        self._block = block
        for first in range(start, stop, block):
            codes = np.array(store.codes[first : min(first + block, stop)])
            self._vectors[first - start :][: len(codes)] = torch.from_numpy(codes.view(dtype)).to(device)

    def candidates(self, queries: npt.NDArray[np.float32], wanted: int) -> torch.Tensor:
        """Return the rows of the best products with ``queries`` [N, dim]: int64 [N, at most wanted]."""
        import torch

        device = self._vectors.device
        wanted = min(wanted, len(self._vectors))
        halves = torch.from_numpy(queries).to(device, torch.float16)
        scores = torch.empty((len(queries), 0), device=device)
        rows = torch.empty((len(queries), 0), dtype=torch.int64, device=device)
        for first in range(0, len(self._vectors), self._block):
            products = _products(halves, self._vectors[first : first + self._block])
            best, places = products.topk(min(wanted, products.shape[1]), dim=1)
            scores, rows = torch.cat([scores, best], 1), torch.cat([rows, places + (self._start + first)], 1)
            scores, kept = scores.topk(min(wanted, scores.shape[1]), dim=1)
            rows = rows.gather(1, kept)
        return rows


def _products(queries: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return the inner products of fp16 [N, dim] and [rows, dim] in fp32: fp16 cannot tell them apart."""
    import torch

    if queries.is_cuda:
        return torch.mm(queries, vectors.T, out_dtype=torch.float32)
    return queries.float() @ vectors.float().T
