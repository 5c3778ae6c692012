from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from searchrl.retrieval.bm25 import K1, B, Bm25Index, best_rows, tokenize, write_bm25
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.types import Hit


@pytest.fixture(scope="module")
def index(bm25_directory: Path) -> Bm25Index:
    return Bm25Index(bm25_directory / "bm25")


def reference(texts: list[str], query: str) -> list[float]:
    """BM25 as Lucene defines it, word by word."""
    documents = tokenize(texts)
    mean = sum(map(len, documents)) / len(documents)
    scores = [0.0] * len(texts)
    for word in tokenize([query])[0]:
        containing = sum(word in document for document in documents)
        if not containing:
            continue
        idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
        for row, document in enumerate(documents):
            count = document.count(word)
            scores[row] += idf * count / (count + K1 * (1 - B + B * len(document) / mean))
    return scores


def test_a_score_worked_out_by_hand(tmp_path: Path) -> None:
    """Two passages of 2 and 4 words (mean 3), the word in the first only.

    idf = ln(1 + (2 - 1 + .5) / (1 + .5)) = ln 2; tf = 1 / (1 + .9 (.6 + .4 * 2/3)) = 1 / 1.78.
    """
    write_bm25(tmp_path, ["red apple", "green pear yellow plum"])
    (hits,) = Bm25Index(tmp_path).search(["apples"], 3)
    assert [hit.row for hit in hits] == [0]
    assert hits[0].score == pytest.approx(math.log(2) / 1.78, rel=1e-6)


@pytest.mark.parametrize(
    "query", ["capital of France", "river in countries", "Which planet is largest?", "metal metal chemical"]
)
def test_scores_equal_the_reference(index: Bm25Index, contents: list[str], query: str) -> None:
    scores = reference(contents, query)
    expected = sorted((-score, row) for row, score in enumerate(scores) if score > 0)
    (hits,) = index.search([query], 50)
    assert {hit.row for hit in hits} == {row for _, row in expected}
    assert [hit.score for hit in hits] == pytest.approx([-score for score, _ in expected], rel=1e-5)


def test_words_are_stemmed_and_case_does_not_matter(index: Bm25Index) -> None:
    assert index.search(["COMPOSING symphony"], 1)[0][0].row == 40


@pytest.mark.parametrize("query", ["xyzzy qwerty", "the of and", "?!", "é"])
def test_a_query_without_known_words_finds_nothing(index: Bm25Index, query: str) -> None:
    assert index.search([query], 3) == [[]]


def test_batched_equals_single(index: Bm25Index, contents: list[str]) -> None:
    queries = [text.partition("\n")[2] for text in contents] + ["nothing xyzzy"]
    assert index.search(queries, 5) == [index.search([query], 5)[0] for query in queries]
    assert index.search([], 5) == []


@settings(max_examples=100)
@given(
    scores=hnp.arrays(np.float32, st.integers(1, 30), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0])),
    top_k=st.integers(1, 40),
)
def test_the_best_rows_are_those_of_a_full_sort(scores: np.ndarray, top_k: int) -> None:
    ranked = sorted((-float(score), row) for row, score in enumerate(scores) if score > 0)
    assert best_rows(scores, top_k) == [Hit(row, -score) for score, row in ranked[:top_k]]


def test_two_builds_give_the_same_bytes(tmp_path: Path, contents: list[str]) -> None:
    program = (
        "import sys; from searchrl.retrieval.bm25 import write_bm25; write_bm25(sys.argv[1], sys.argv[2:])"
    )
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
        command = [sys.executable, "-c", program, str(tmp_path / seed), *contents]
        subprocess.run(command, env=environment, check=True)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names
    assert all((tmp_path / "1" / n).read_bytes() == (tmp_path / "2" / n).read_bytes() for n in names)


def test_the_size_of_a_chunk_changes_nothing(
    tmp_path: Path, contents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    write_bm25(tmp_path / "one", iter(contents), on_rows=seen.append)
    monkeypatch.setattr("searchrl.retrieval.bm25._CHUNK", 7)
    write_bm25(tmp_path / "many", iter(contents), on_rows=seen.append)
    assert seen == [50, *[7] * 7, 1]
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "many" / file.name).read_bytes() == file.read_bytes()


def test_neither_numba_nor_jax_is_imported(bm25_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").touch()  # whoever has it, has it on a GPU, all of which it would claim
    (tmp_path / "jax" / "lax.py").write_text("raise SystemExit('jax was asked for something')")
    program = (
        "import sys; from searchrl.retrieval.bm25 import Bm25Index\n"
        "assert Bm25Index(sys.argv[1]).search(['capital of France'], 1)\n"
        "assert not {'numba', 'jax'} & sys.modules.keys()\n"
        "import jax\n"
    )
    environment = {"PYTHONPATH": f"{Path(__file__).parents[2] / 'src'}{os.pathsep}{tmp_path}"}
    subprocess.run([sys.executable, "-c", program, str(bm25_directory / "bm25")], env=environment, check=True)


def test_the_index_covers_the_corpus(index: Bm25Index, corpus_path: Path) -> None:
    assert index.size == len(Corpus(corpus_path))
