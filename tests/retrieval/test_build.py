from __future__ import annotations

import json
from pathlib import Path

import pytest

from searchrl.config import IndexKind
from searchrl.retrieval.build import build_index
from searchrl.retrieval.corpus import Corpus, CorpusError
from searchrl.retrieval.encoder import EncoderFamily, weights_fingerprint
from searchrl.retrieval.loading import load_index
from searchrl.retrieval.manifest import BuildError, IndexMismatchError, read_manifest


def small_corpus(folder: Path, texts: list[str]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "contents": t}) + "\n" for i, t in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory, corpus_path: Path, encoder_path: Path) -> Path:
    directory = tmp_path_factory.mktemp("index") / "hybrid"
    family = EncoderFamily.E5
    build_index(
        corpus_path, directory, kind=IndexKind.hybrid, encoder_path=encoder_path, encoder_family=family
    )
    return directory


def test_a_hybrid_index_is_built_and_searched(hybrid: Path, corpus_path: Path) -> None:
    index = load_index(hybrid, Corpus(corpus_path))
    assert index.size == 50
    hits = index.search(["capital of France"], 3)[0]
    assert len(hits) == 3
    assert hits == load_index(hybrid, Corpus(corpus_path)).search(["capital of France"], 3)[0]


def test_the_manifest_says_what_the_index_is(hybrid: Path, corpus_path: Path, encoder_path: Path) -> None:
    manifest = read_manifest(hybrid)
    assert (manifest.kind, manifest.rows, manifest.dim, manifest.metric) == (
        "hybrid",
        50,
        32,
        "inner_product",
    )
    assert manifest.corpus_sha256 == Corpus(corpus_path).sha256
    assert manifest.encoder is not None
    assert manifest.encoder.fingerprint == weights_fingerprint(encoder_path)
    assert (manifest.encoder.query_prefix, manifest.encoder.pooling) == ("query: ", "mean")
    assert manifest.bm25 == {"k1": 0.9, "b": 0.4, "stemmer": "english", "stopwords": "en"}
    assert {"dense.faiss", "bm25/data.csc.index.npy"} <= set(manifest.files)


def test_building_again_changes_nothing(tmp_path: Path, corpus_path: Path) -> None:
    first = build_index(corpus_path, tmp_path / "i", kind=IndexKind.bm25)
    written = (tmp_path / "i/manifest.json").stat().st_mtime_ns
    assert build_index(corpus_path, tmp_path / "i", kind=IndexKind.bm25) == first
    assert (tmp_path / "i/manifest.json").stat().st_mtime_ns == written


def test_another_corpus_or_a_damaged_file_builds_anew(tmp_path: Path, corpus_path: Path) -> None:
    first = build_index(corpus_path, tmp_path / "i", kind=IndexKind.bm25)
    other = small_corpus(tmp_path, ["red apple", "green pear"])
    second = build_index(other, tmp_path / "i", kind=IndexKind.bm25)
    assert second.fingerprint != first.fingerprint
    (tmp_path / "i/bm25/data.csc.index.npy").write_bytes(b"")
    assert build_index(other, tmp_path / "i", kind=IndexKind.bm25).fingerprint == second.fingerprint
    assert load_index(tmp_path / "i", Corpus(other)).search(["pears"], 1)[0][0].row == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["i"]


def test_an_index_of_another_corpus_is_refused(
    tmp_path: Path, bm25_directory: Path, corpus_path: Path
) -> None:
    other = Corpus(small_corpus(tmp_path, ["red apple"]))
    with pytest.raises(IndexMismatchError) as caught:
        load_index(bm25_directory, other)
    message = str(caught.value)
    assert Corpus(corpus_path).sha256 in message
    assert other.sha256 in message
    assert "build the index anew" in message


def test_an_index_of_another_encoder_is_refused(
    tmp_path: Path, hybrid: Path, corpus_path: Path, encoder_path: Path
) -> None:
    for file in encoder_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    corpus = Corpus(corpus_path)
    assert load_index(hybrid, corpus, encoder_path=tmp_path).size == 50
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    with pytest.raises(IndexMismatchError) as caught:
        load_index(hybrid, corpus, encoder_path=tmp_path)
    message = str(caught.value)
    assert weights_fingerprint(encoder_path) in message
    assert weights_fingerprint(tmp_path) in message
    assert "encoder_path" in message
    with pytest.raises(IndexMismatchError, match=r"is not at .*missing: give its folder as encoder_path"):
        load_index(hybrid, corpus, encoder_path=tmp_path / "missing")


def test_an_altered_file_is_refused(tmp_path: Path, corpus_path: Path) -> None:
    build_index(corpus_path, tmp_path / "i", kind=IndexKind.bm25)
    data = tmp_path / "i/bm25/data.csc.index.npy"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(IndexMismatchError, match=r"has SHA-256 .* its manifest says"):
        load_index(tmp_path / "i", Corpus(corpus_path))
    data.write_bytes(content[:-1])
    with pytest.raises(IndexMismatchError, match="bytes, its manifest says"):
        load_index(tmp_path / "i", Corpus(corpus_path))


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "0", "contents": "x"}\n{"id": "1"}\n')
    with pytest.raises(CorpusError, match="line 2"):
        build_index(path, tmp_path / "i", kind=IndexKind.bm25)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_folders_that_are_no_index(tmp_path: Path, corpus_path: Path, encoder_path: Path) -> None:
    corpus = Corpus(corpus_path)
    with pytest.raises(IndexMismatchError, match="no index at"):
        load_index(tmp_path / "missing", corpus)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").write_text("years of work")
    with pytest.raises(BuildError, match="holds no index: choose another directory"):
        build_index(corpus_path, tmp_path / "thesis", kind=IndexKind.bm25)
    assert (tmp_path / "thesis/chapter").read_text() == "years of work"
    (tmp_path / "old").mkdir()
    (tmp_path / "old/manifest.json").write_text("[]")
    with pytest.raises(IndexMismatchError, match="cannot be read"):
        load_index(tmp_path / "old", corpus)
    (tmp_path / "old/manifest.json").write_text('{"format": 1}')
    with pytest.raises(IndexMismatchError, match="has format 1, this version reads 2: build it anew"):
        load_index(tmp_path / "old", corpus)
    with pytest.raises(ValueError, match="encoder_path is needed"):
        build_index(corpus_path, tmp_path / "x", kind=IndexKind.dense)
    with pytest.raises(ValueError, match="encoder_path is needed"):
        build_index(corpus_path, tmp_path / "x", kind=IndexKind.bm25, encoder_path=encoder_path)
