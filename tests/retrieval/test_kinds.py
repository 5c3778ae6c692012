from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from searchrl.retrieval.dense import FaissVectors
from searchrl.retrieval.dense_build import write_dense, write_flat
from searchrl.retrieval.flatfile import RowStore, faiss
from searchrl.retrieval.kinds import RECIPES, cost, is_streamed, resolve_kind
from searchrl.retrieval.manifest import DENSE, STORE, BuildError

NEAR = {
    "flat": 1.0,
    "fp16": 1.0,
    "sq8": 0.98,
    "sq6": 0.95,
    "sq4": 0.8,
    "pq": 0.65,
    "opq_pq": 0.65,
    "pq_fastscan": 0.5,
    "opq_pq_fastscan": 0.5,
    "rabitq": 0.95,
    "rabitq1": 0.5,
    "ivf_flat": 0.95,
    "ivf_fp16": 0.95,
    "ivf_sq8": 0.93,
    "ivf_pq": 0.65,
    "ivf_pq_fastscan": 0.5,
    "ivf_rabitq": 0.93,
    "hnsw": 0.98,
    "hnsw_sq8": 0.95,
}
"""Least recall@3 on the clustered vectors. Real ones are another matter: `searchrl index evaluate`."""


def queries(flat: Path, number: int = 100) -> npt.NDArray[np.float32]:
    store = RowStore(flat)
    rows = np.random.default_rng(1).permutation(store.rows)[:number]
    noise = np.random.default_rng(2).normal(size=(number, store.dim)).astype(np.float32)
    return store.vectors(rows) + 0.05 * noise


def build(flat: Path, name: str, folder: Path) -> FaissVectors:
    store = RowStore(flat)
    kind = resolve_kind(name, rows=store.rows, dim=store.dim)
    write_dense(flat, kind, folder, progress=False)
    held = folder / STORE if kind.store else None
    return FaissVectors(folder / DENSE, store=held, search=kind.search)


def recall(index: FaissVectors, flat: Path) -> float:
    asked = queries(flat)
    truth = FaissVectors(flat).search(asked, 3)
    found = index.search(asked, 3)
    same = [len({h.row for h in a} & {h.row for h in b}) for a, b in zip(found, truth, strict=True)]
    return sum(same) / (3 * len(asked))


def test_every_kind_has_a_threshold() -> None:
    assert list(NEAR) == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_kind_finds_costs_and_does_not_depend_on_batches(
    name: str, clustered: Path, tmp_path: Path
) -> None:
    index = build(clustered, name, tmp_path)
    assert (index.size, index.dim) == (4000, 64)
    assert recall(index, clustered) >= NEAR[name]
    asked = queries(clustered, 20)
    assert index.search(asked, 5) == [index.search(one[None], 5)[0] for one in asked]
    computed = cost(resolve_kind(name, rows=4000, dim=64), rows=4000).index
    # Quantizers' tables (a few times 64 kB) are left out of the computation: nothing at 21 million vectors.
    assert (tmp_path / DENSE).stat().st_size == pytest.approx(computed, rel=0.02, abs=100_000)


@pytest.mark.parametrize("name", ["pq_fastscan+fp16", "pq_fastscan+sq8", "rabitq1+flat"])
def test_a_store_gives_small_indexes_the_recall_of_large_ones(
    name: str, clustered: Path, tmp_path: Path
) -> None:
    index = build(clustered, name, tmp_path)
    assert recall(index, clustered) >= 0.98
    price = cost(resolve_kind(name, rows=4000, dim=64), rows=4000)
    assert price.index <= 4000 * 64 * 4 / 4, "at most a quarter of the flat index in memory"
    assert (tmp_path / STORE).stat().st_size == pytest.approx(price.store, rel=0.01)
    asked = queries(clustered, 20)
    assert index.search(asked, 30) == [index.search(one[None], 30)[0] for one in asked]
    exact = FaissVectors(clustered).search(asked, 1)
    if name.endswith("+flat"):
        assert [hits[0] for hits in index.search(asked, 3)] == [hits[0] for hits in exact]


def test_sq8_keeps_the_promise_of_a_quarter(clustered: Path, tmp_path: Path) -> None:
    assert recall(build(clustered, "sq8", tmp_path), clustered) >= 0.98
    assert (tmp_path / DENSE).stat().st_size <= clustered.stat().st_size * 0.26


@pytest.mark.parametrize("name", ["Flat", "SQfp16", "SQ8", "SQ6", "SQ4"])
def test_a_streamed_file_is_what_faiss_would_write(name: str, clustered: Path, tmp_path: Path) -> None:
    assert is_streamed(name)
    vectors = RowStore(clustered).vectors(slice(None))
    index = faiss().index_factory(64, name, faiss().METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss().write_index(index, str(tmp_path / "faiss"))
    build(clustered, name, tmp_path)
    expected, found = (tmp_path / "faiss").read_bytes(), (tmp_path / DENSE).read_bytes()
    # The order of the training rows changes SQ's ranges by rounding only; here all rows are in the sample.
    assert found == expected


def test_two_builds_are_the_same(clustered: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        build(clustered, "ivf_sq8", tmp_path / place)
    assert (tmp_path / "a" / DENSE).read_bytes() == (tmp_path / "b" / DENSE).read_bytes()


def test_missing_results_are_no_documents(clustered: Path, tmp_path: Path) -> None:
    index = build(clustered, "IVF64,Flat:nprobe=1", tmp_path)
    found = index.search(queries(clustered, 10), 1000)
    assert all(0 < len(hits) < 1000 for hits in found)
    assert all(hit.row >= 0 for hits in found for hit in hits)


def test_vectors_that_rounding_confuses_do_not_depend_on_batches(tmp_path: Path) -> None:
    """A matrix product rounds otherwise than a scan does: among near-equals the best three would differ."""
    rng = np.random.default_rng(0)
    subjects = rng.normal(size=(20, 1, 64)).astype(np.float32)
    vectors = (subjects + rng.normal(size=(20, 12, 64)).astype(np.float32) * 1e-6).reshape(240, 64)
    write_flat(tmp_path / "flat", vectors)
    index = FaissVectors(tmp_path / "flat")
    asked = subjects[:, 0]
    assert index.search(asked, 3) == [index.search(one[None], 3)[0] for one in asked]


def test_search_parameters_come_from_the_name(clustered: Path, tmp_path: Path) -> None:
    for nprobe in ("1", "64"):
        (tmp_path / nprobe).mkdir()
    little = recall(build(clustered, "IVF64,Flat:nprobe=1", tmp_path / "1"), clustered)
    assert little < recall(build(clustered, "IVF64,Flat:nprobe=64", tmp_path / "64"), clustered) == 1.0
    assert resolve_kind("pq_fastscan+fp16:candidates=128", rows=99, dim=8).search == {"candidates": 128}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sq9", "there is no dense index called 'sq9'; did you mean 'sq8'?"),
        ("pq_fast_scan", "did you mean 'pq_fastscan'?"),
        ("", "there is no dense index called ''"),
        ("pq_fastscan+fp8", "'fp8' is no store; choose one of flat, fp16, sq8"),
        (
            "ivf_sq8:probes=4",
            "'probes=4' is no search parameter; write one of nprobe=N, efSearch=N, candidates=N",
        ),
        ("ivf_sq8:nprobe=0", "'nprobe=0' is no search parameter"),
        ("flat:nprobe=4", "FAISS refuses the index 'Flat' of 30 numbers: .*nprobe"),
        ("Nonsense8", "FAISS refuses the index 'Nonsense8' of 30 numbers: could not parse"),
        ("PQ7", "FAISS refuses the index 'PQ7' of 30 numbers"),
        ("pq", "pq needs 256 passages to train, this corpus has 100: choose flat or sq8"),
    ],
)
def test_a_kind_that_cannot_be_is_refused(name: str, reason: str) -> None:
    with pytest.raises(BuildError, match=reason.replace("?", r"\?")):
        resolve_kind(name, rows=100, dim=30)


def test_parameters_follow_the_size() -> None:
    """At wiki-18's size: 4 √21M ≈ 18,336, next power of two 16,384; sub-vectors of 4 of 768 numbers."""
    kind = resolve_kind("ivf_pq", rows=21_015_324, dim=768)
    assert kind.factory == "IVF16384,PQ192np"
    assert kind.search == {"nprobe": 1024}
    assert kind.sample == 40 * 16384
    assert resolve_kind("ivf_flat", rows=50, dim=8).factory == "IVF1,Flat"
    assert resolve_kind("pq", rows=300, dim=30).factory == "PQ6np"  # 5 is the next length that divides 30


@pytest.mark.parametrize(
    ("name", "gigabytes", "store"),
    [
        ("flat", 64.6, 0.0),
        ("fp16", 32.3, 0.0),
        ("sq8", 16.1, 0.0),
        ("sq6", 12.1, 0.0),
        ("rabitq", 12.5, 0.0),
        ("pq_fastscan+fp16", 2.0, 32.3),
        ("hnsw_sq8", 21.9, 0.0),
    ],
)
def test_costs_at_the_size_of_wiki_18(name: str, gigabytes: float, store: float) -> None:
    price = cost(resolve_kind(name, rows=21_015_324, dim=768), rows=21_015_324)
    assert price.index / 1e9 == pytest.approx(gigabytes, abs=0.06)
    assert price.store / 1e9 == pytest.approx(store, abs=0.06)
    if name in ("flat", "fp16", "sq8", "sq6"):
        assert price.building < 0.3e9, "written as it grows"
