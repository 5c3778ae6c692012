from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from searchrl.config import IndexKind
from searchrl.retrieval.build import build_index
from searchrl.retrieval.convert import convert_index
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.devices import DeviceError
from searchrl.retrieval.loading import load_index, open_vectors
from searchrl.retrieval.manifest import BuildError, IndexMismatchError, Manifest, read_manifest


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory, corpus_path: Path, encoder_path: Path) -> Path:
    directory = tmp_path_factory.mktemp("convert") / "hybrid"
    build(corpus_path, directory, encoder_path, kind=IndexKind.hybrid)
    return directory


def build(
    corpus: Path, directory: Path, encoder: Path, *, kind: IndexKind, dense_index: str = "flat"
) -> Manifest:
    return build_index(
        corpus, directory, kind=kind, encoder_path=encoder, dense_index=dense_index, progress=False
    )


@pytest.mark.parametrize("name", ["sq8", "pq_fastscan+flat", "ivf_sq8:nprobe=4", "SQ6"])
def test_it_is_what_a_build_of_that_kind_gives(
    tmp_path: Path, hybrid: Path, corpus_path: Path, encoder_path: Path, name: str
) -> None:
    made = convert_index(hybrid, tmp_path / "converted", dense_index=name, progress=False)
    built = build(corpus_path, tmp_path / "built", encoder_path, kind=IndexKind.hybrid, dense_index=name)
    assert made.fingerprint == built.fingerprint != read_manifest(hybrid).fingerprint
    assert made == read_manifest(tmp_path / "converted")
    corpus = Corpus(corpus_path)
    found = load_index(tmp_path / "converted", corpus).search(["capital of France"], 3)
    assert found == load_index(tmp_path / "built", corpus).search(["capital of France"], 3)


def test_what_stays_the_same_is_not_copied(tmp_path: Path, hybrid: Path) -> None:
    convert_index(hybrid, tmp_path / "c", dense_index="pq_fastscan+flat", progress=False)
    assert (tmp_path / "c/store.faiss").samefile(hybrid / "dense.faiss")
    assert (tmp_path / "c/bm25/data.csc.index.npy").samefile(hybrid / "bm25/data.csc.index.npy")
    convert_index(tmp_path / "c", tmp_path / "back", dense_index="flat", progress=False)
    assert read_manifest(tmp_path / "back").fingerprint == read_manifest(hybrid).fingerprint


def test_what_cannot_be_converted(tmp_path: Path, hybrid: Path, bm25_directory: Path) -> None:
    convert_index(hybrid, tmp_path / "sq8", dense_index="sq8", progress=False)
    with pytest.raises(IndexMismatchError, match="is sq8 and has no exact vectors: build a flat index"):
        convert_index(tmp_path / "sq8", tmp_path / "x", dense_index="sq4")
    with pytest.raises(IndexMismatchError, match="is bm25 and has no exact vectors"):
        convert_index(bm25_directory, tmp_path / "x", dense_index="sq4")
    with pytest.raises(BuildError, match="holds an index already"):
        convert_index(hybrid, tmp_path / "sq8", dense_index="sq4")
    with pytest.raises(BuildError, match="did you mean 'sq8'"):
        convert_index(hybrid, tmp_path / "x", dense_index="sq9")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sq8"]


def test_building_another_kind_replaces_the_index(
    tmp_path: Path, corpus_path: Path, encoder_path: Path
) -> None:
    flat = build(corpus_path, tmp_path / "i", encoder_path, kind=IndexKind.dense)
    sq8 = build(corpus_path, tmp_path / "i", encoder_path, kind=IndexKind.dense, dense_index="sq8")
    assert (flat.dense and flat.dense.index, sq8.dense and sq8.dense.index) == ("flat", "sq8")
    assert sorted(path.name for path in (tmp_path / "i").iterdir()) == ["dense.faiss", "manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i"]


def test_an_index_of_the_first_format_is_built_anew(
    tmp_path: Path, hybrid: Path, corpus_path: Path, encoder_path: Path
) -> None:
    shutil.copytree(hybrid, tmp_path / "old")
    manifest = json.loads((tmp_path / "old/manifest.json").read_text())
    del manifest["dense"]
    (tmp_path / "old/manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(IndexMismatchError, match="has format 1, this version reads 2: build it anew"):
        load_index(tmp_path / "old", Corpus(corpus_path))
    made = build(corpus_path, tmp_path / "old", encoder_path, kind=IndexKind.hybrid)
    assert made.fingerprint == read_manifest(hybrid).fingerprint


@pytest.mark.parametrize(
    ("name", "devices", "reason"),
    [
        ("flat", ["cpu", "cuda:0"], r"\[cpu, cuda:0\] are neither the CPU alone nor GPUs alone: write cpu"),
        ("flat", ["cuda:0", "cuda:0"], "are neither the CPU alone"),
        ("flat", ["gpu"], "are neither the CPU alone"),
        ("flat", [], "are neither the CPU alone"),
        (
            "pq_fastscan+flat",
            ["cuda:0"],
            r"cannot be searched on GPUs: choose devices \[cpu\], or a flat or fp16",
        ),
        ("ivf_sq8", ["cuda:0"], r"needs the package faiss-gpu in the place of faiss-cpu"),
    ],
)
def test_devices_that_cannot_be(
    tmp_path: Path, hybrid: Path, name: str, devices: list[str], reason: str
) -> None:
    manifest = convert_index(hybrid, tmp_path / "c", dense_index=name, progress=False)
    assert manifest.dense is not None
    with pytest.raises(DeviceError, match=reason):
        open_vectors(tmp_path / "c", manifest.dense, devices)


@pytest.mark.gpu
def test_a_whole_index_on_a_gpu_answers_as_on_the_cpu(hybrid: Path, corpus_path: Path) -> None:
    corpus = Corpus(corpus_path)
    there = load_index(hybrid, corpus, devices=["cuda:0"])
    for query in ("capital of France", "the highest mountain"):
        (on_gpu,), (on_cpu,) = there.search([query], 3), load_index(hybrid, corpus).search([query], 3)
        assert [hit.row for hit in on_gpu] == [hit.row for hit in on_cpu]


@pytest.mark.gpu
def test_inverted_lists_on_a_gpu(tmp_path: Path, hybrid: Path, corpus_path: Path) -> None:
    from searchrl.retrieval.flatfile import faiss

    if not hasattr(faiss(), "StandardGpuResources"):
        pytest.skip("this FAISS is the CPU's")
    convert_index(hybrid, tmp_path / "c", dense_index="ivf_flat", progress=False)
    corpus = Corpus(corpus_path)
    there = load_index(tmp_path / "c", corpus, devices=["cuda:0"]).search(["capital of France"], 3)
    here = load_index(tmp_path / "c", corpus).search(["capital of France"], 3)
    assert [hit.row for hit in there[0]] == [hit.row for hit in here[0]]
