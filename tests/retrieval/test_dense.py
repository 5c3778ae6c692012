from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from searchrl.retrieval.dense import DenseIndex, FaissVectors
from searchrl.retrieval.dense_build import write_flat
from searchrl.retrieval.encoder import (
    SPECS,
    Encoder,
    EncoderFamily,
    TextKind,
    encoder_dim,
    weights_fingerprint,
)


@pytest.fixture(scope="module")
def encoder(encoder_path: Path) -> Encoder:
    return Encoder(encoder_path, EncoderFamily.MINILM, batch_size=4)


@pytest.mark.parametrize("family", list(EncoderFamily))
def test_vectors_equal_a_plain_computation_one_text_at_a_time(
    encoder_path: Path, contents: list[str], family: EncoderFamily
) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_path)
    model = AutoModel.from_pretrained(encoder_path).eval()
    spec = SPECS[family]
    expected = []
    for text in contents:
        with torch.no_grad():
            states = model(**tokenizer(spec.passage_prefix + text, return_tensors="pt")).last_hidden_state[0]
        vector = (states[0] if family is EncoderFamily.BGE else states.mean(0)).numpy()
        expected.append(vector / np.linalg.norm(vector))
    vectors = Encoder(encoder_path, family, batch_size=7).encode(contents, TextKind.PASSAGE)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, np.array(expected), atol=1e-5)


BGE_INSTRUCTION = "Represent this sentence for searching relevant passages: "


@pytest.mark.parametrize(
    ("family", "kind", "prefix"),
    [
        (EncoderFamily.E5, TextKind.QUERY, "query: "),
        (EncoderFamily.E5, TextKind.PASSAGE, "passage: "),
        (EncoderFamily.BGE, TextKind.QUERY, BGE_INSTRUCTION),
        (EncoderFamily.BGE, TextKind.PASSAGE, ""),
        (EncoderFamily.MINILM, TextKind.QUERY, ""),
        (EncoderFamily.MINILM, TextKind.PASSAGE, ""),
    ],
)
def test_prefix_and_pooling_of_a_family(
    encoder_path: Path, family: EncoderFamily, kind: TextKind, prefix: str
) -> None:
    """A batch of a long and a short text: a pooling that counts padding, or a wrong prefix, would show."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["Paris", "the capital of France lies on the Seine"]
    tokenizer = AutoTokenizer.from_pretrained(encoder_path)
    model = AutoModel.from_pretrained(encoder_path).eval()
    expected = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(prefix + text, return_tensors="pt")).last_hidden_state[0].numpy()
        vector = states[0] if family is EncoderFamily.BGE else sum(states) / len(states)
        expected.append(vector / np.sqrt((vector**2).sum()))
    vectors = Encoder(encoder_path, family).encode(texts, kind)
    np.testing.assert_allclose(vectors, np.array(expected), atol=1e-5)
    assert encoder_dim(encoder_path) == vectors.shape[1] == 32


def test_threads_and_batches_change_nothing(
    encoder_path: Path, encoder: Encoder, contents: list[str]
) -> None:
    import torch

    before = torch.get_num_threads()
    finished: list[int] = []
    parallel = Encoder(encoder_path, EncoderFamily.MINILM, batch_size=9, threads=2)
    vectors = parallel.encode(contents, TextKind.PASSAGE, on_progress=finished.append)
    np.testing.assert_allclose(vectors, encoder.encode(contents, TextKind.PASSAGE), atol=1e-5)
    assert sum(finished) == 50
    assert torch.get_num_threads() == before


def test_a_long_text_is_cut_and_no_text_is_fine(encoder: Encoder) -> None:
    assert encoder.encode(["river " * 500], TextKind.QUERY).shape == (1, encoder.dim)
    assert encoder.encode([], TextKind.QUERY).shape == (0, encoder.dim)


def test_search_is_exact_with_ties_by_row(tmp_path: Path, encoder: Encoder, contents: list[str]) -> None:
    texts = [contents[8], *contents, contents[8]]  # rows 0, 9 and 51 are equal
    vectors = encoder.encode(texts, TextKind.PASSAGE)
    vectors[[9, 51]] = vectors[0]
    write_flat(tmp_path / "index", vectors)
    index = DenseIndex(FaissVectors(tmp_path / "index"), encoder)
    assert index.size == 52
    queries = [contents[8], "capital of France", "the highest mountain"]
    scores = encoder.encode(queries, TextKind.QUERY) @ vectors.T
    found = index.search(queries, 10)
    assert [hit.row for hit in found[0][:3]] == [0, 9, 51]
    for hits, row_scores in zip(found, scores, strict=True):
        assert [hit.score for hit in hits] == pytest.approx(sorted(row_scores, reverse=True)[:10], abs=1e-5)
        assert [hit.score for hit in hits] == pytest.approx([row_scores[hit.row] for hit in hits], abs=1e-5)


def test_batched_equals_single(tmp_path: Path, encoder: Encoder, contents: list[str]) -> None:
    write_flat(tmp_path / "index", encoder.encode(contents, TextKind.PASSAGE))
    index = DenseIndex(FaissVectors(tmp_path / "index"), encoder)
    batched = index.search(contents, 3)
    for hits, query in zip(batched, contents, strict=True):
        single = index.search([query], 3)[0]
        assert [hit.row for hit in hits] == [hit.row for hit in single]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in single], abs=1e-5)


def test_more_than_there_is(tmp_path: Path, encoder: Encoder, contents: list[str]) -> None:
    write_flat(tmp_path / "index", encoder.encode(contents[:4], TextKind.PASSAGE))
    index = DenseIndex(FaissVectors(tmp_path / "index"), encoder)
    assert sorted(hit.row for hit in index.search(["Paris"], 100)[0]) == [0, 1, 2, 3]
    assert index.search([], 3) == []


def test_another_dimension_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    write_flat(tmp_path / "index", np.ones((3, 8), dtype=np.float32))
    with pytest.raises(ValueError, match=r"vectors of 8 numbers, the encoder makes 32"):
        DenseIndex(FaissVectors(tmp_path / "index"), encoder)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Encoder(tmp_path, EncoderFamily.E5)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        encoder_dim(tmp_path)


def test_the_fingerprint_follows_the_weights(tmp_path: Path, encoder_path: Path) -> None:
    for file in encoder_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert weights_fingerprint(tmp_path) == weights_fingerprint(encoder_path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert weights_fingerprint(tmp_path) != weights_fingerprint(encoder_path)
