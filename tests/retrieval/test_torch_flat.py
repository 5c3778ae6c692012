from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from searchrl.retrieval.dense import FaissVectors, VectorIndex
from searchrl.retrieval.dense_build import write_dense, write_flat
from searchrl.retrieval.flatfile import RowStore
from searchrl.retrieval.kinds import resolve_kind
from searchrl.retrieval.manifest import DENSE
from searchrl.retrieval.torch_flat import TorchVectors

DEVICES = [
    pytest.param(["cpu"], id="one"),
    pytest.param(["cpu", "cpu", "cpu"], id="three"),
    pytest.param(["cuda:0"], id="gpu", marks=pytest.mark.gpu),
]


def agree(index: VectorIndex, exact: VectorIndex, queries: np.ndarray, top_k: int) -> None:
    assert index.search(queries, top_k) == exact.search(queries, top_k)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("block", [1000, 1 << 17])
def test_answers_are_those_of_faiss(clustered: Path, devices: list[str], block: int) -> None:
    index = TorchVectors(clustered, devices=devices, block=block)
    assert (index.size, index.dim) == (4000, 64)
    queries = RowStore(clustered).vectors(slice(0, 50)) + np.float32(0.01)
    agree(index, FaissVectors(clustered), queries, 5)
    assert index.search(queries, 5) == [index.search(one[None], 5)[0] for one in queries]


@pytest.mark.parametrize("devices", DEVICES)
def test_fp16_files_are_searched_as_faiss_searches_them(
    clustered: Path, tmp_path: Path, devices: list[str]
) -> None:
    write_dense(clustered, resolve_kind("fp16", rows=4000, dim=64), tmp_path, progress=False)
    queries = RowStore(clustered).vectors(slice(0, 50))
    index = TorchVectors(tmp_path / DENSE, devices=devices)
    agree(index, FaissVectors(tmp_path / DENSE), queries, 5)


@pytest.mark.parametrize("devices", DEVICES)
def test_ties_go_by_row_and_all_rows_can_be_had(tmp_path: Path, devices: list[str]) -> None:
    vectors = np.eye(8, dtype=np.float32)[[0, 1, 0, 2, 0, 3, 0]]
    write_flat(tmp_path / "flat", vectors)
    index = TorchVectors(tmp_path / "flat", devices=devices, block=2)
    (hits,) = index.search(vectors[:1], 100)
    assert [hit.row for hit in hits] == [0, 2, 4, 6, 1, 3, 5]
    assert [hit.score for hit in hits] == [1, 1, 1, 1, 0, 0, 0]


def test_fp16_rounding_does_not_decide(tmp_path: Path) -> None:
    """Scores that fp16 cannot tell apart are told apart by the file's fp32 vectors."""
    vectors = np.zeros((40, 4), dtype=np.float32)
    vectors[:, 0] = 1 + np.arange(40) * 1e-6
    write_flat(tmp_path / "flat", vectors)
    (hits,) = TorchVectors(tmp_path / "flat", devices=["cpu"]).search(vectors[:1], 3)
    assert [hit.row for hit in hits] == [39, 38, 37]
