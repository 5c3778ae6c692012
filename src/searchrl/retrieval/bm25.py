"""BM25 over stemmed English words, with bm25s and numpy only.

Scores are those of Lucene's BM25 with k1 0.9 and b 0.4 (Anserini's values for passages), precomputed for each
(word, passage) when the index is built; a query sums its words' columns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from searchrl.retrieval.types import Hit

K1 = 0.9
B = 0.4
STEMMER = "english"
STOPWORDS = "en"


def _bm25s() -> Any:
    """Import bm25s without numba, which it would import for a backend that is not used here.

    With numba's objects loaded vLLM's kernel registration fails, and its import costs a second.
    """
    if "bm25s" in sys.modules or "numba" in sys.modules:
        return import_module("bm25s")
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules["numba"] = None  # makes `import numba` raise ImportError
    try:
        return import_module("bm25s")
    finally:
        del modules["numba"]


def tokenize(texts: Sequence[str]) -> list[list[str]]:
    """Return the stemmed words of each text, lower-cased, without stop words and single characters."""
    tokens: list[list[str]] = _bm25s().tokenize(
        list(texts),
        stopwords=STOPWORDS,
        stemmer=import_module("Stemmer").Stemmer(STEMMER),
        return_ids=False,
        show_progress=False,
    )
    return tokens


class Bm25Index:
    """A BM25 index saved by `write_bm25` in the folder ``path``, memory-mapped."""

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        self._index: Any = _bm25s().BM25.load(folder, mmap=True, load_corpus=False, show_progress=False)
        self._size = int(json.loads((folder / "params.index.json").read_text())["num_docs"])

    @property
    def size(self) -> int:
        """Number of passages."""
        return self._size

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """See `Index.search`; only passages that share a word with the query are hits."""
        if not queries:
            return []
        return [self._search_one(words, top_k) for words in tokenize(queries)]

    def _search_one(self, words: list[str], top_k: int) -> list[Hit]:
        ids = self._index.get_tokens_ids(words)
        if not ids:
            return []
        return best_rows(self._index.get_scores_from_ids(ids), top_k)


def best_rows(scores: npt.NDArray[np.float32], top_k: int) -> list[Hit]:
    """Return the ``top_k`` rows of ``scores`` [rows] above zero, best first, equal scores by rising row."""
    if top_k < len(scores):
        threshold = np.partition(scores, -top_k)[-top_k]
        rows = np.flatnonzero((scores >= threshold) & (scores > 0))  # keeps every row that ties at the edge
    else:
        rows = np.flatnonzero(scores > 0)
    order = np.argsort(-scores[rows], kind="stable")[:top_k]
    return [Hit(int(row), float(scores[row])) for row in rows[order]]


def write_bm25(path: str | Path, texts: Sequence[str]) -> None:
    """Index ``texts``, one a corpus row, and save the index in the folder ``path``."""
    bm25s = _bm25s()
    tokens = tokenize(texts)
    # A sorted vocabulary makes the same corpus give the same bytes, whatever the hash seed.
    vocabulary = {word: i for i, word in enumerate(sorted({word for words in tokens for word in words}))}
    ids = [[vocabulary[word] for word in words] for words in tokens]
    index = bm25s.BM25(k1=K1, b=B, method="lucene", backend="numpy")
    index.index((ids, vocabulary), show_progress=False)
    index.save(path, show_progress=False)
