"""BM25 over stemmed English words, with bm25s and numpy only.

Scores are those of Lucene's BM25 with k1 0.9 and b 0.4 (Anserini's values for passages), precomputed for each
(word, passage) when the index is built; a query sums its words' columns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from searchrl.retrieval.types import Hit

K1 = 0.9
B = 0.4
STEMMER = "english"
STOPWORDS = "en"
_CHUNK = 1 << 14


def _bm25s() -> Any:
    """Import bm25s without numba and JAX, which it would import for backends that are not used here.

    With numba's objects loaded vLLM's kernel registration fails, and its import costs a second. JAX, where it
    is installed, would claim three quarters of a GPU as soon as it is asked for anything.
    """
    if "bm25s" in sys.modules:
        return import_module("bm25s")
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # None: kept out
    hidden = [name for name in ("numba", "jax") if name not in modules]
    for name in hidden:
        modules[name] = None  # makes `import` raise ImportError
    try:
        return import_module("bm25s")
    finally:
        for name in hidden:
            del modules[name]


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
    rows = np.flatnonzero(scores > 0)  # few: selecting among all the zeros too takes ten times longer
    if top_k < len(rows):
        found = scores[rows]
        threshold = np.partition(found, -top_k)[-top_k]
        rows = rows[found >= threshold]  # keeps every row that ties at the edge
    order = np.argsort(-scores[rows], kind="stable")[:top_k]
    return [Hit(int(row), float(scores[row])) for row in rows[order]]


def write_bm25(
    path: str | Path, texts: Iterable[str], *, on_rows: Callable[[int], None] = lambda rows: None
) -> None:
    """Index ``texts``, one a corpus row, and save the index in the folder ``path``.

    Words are held as numbers and the index is filled in place: for each word of a text 4 bytes, and 8 for
    each different one, which for passages of 100 words is about 0.6 kB each, 13 GB for 21 million.
    ``on_rows`` is called with the texts read since its last call.
    """
    chunks, words = _read(texts, on_rows)
    index = _bm25s().BM25(k1=K1, b=B, method="lucene", backend="numpy")
    index.nonoccurrence_array = None  # of other BM25 variants
    index.scores = _score(chunks, len(words))
    index.vocab_dict = {word: i for i, word in enumerate(words)} | {"": len(words)}
    index.save(path, show_progress=False)


class _Chunk(NamedTuple):
    """Some texts in a row, as numbers of their words."""

    words: npt.NDArray[np.int32]
    """[words of all texts]."""
    lengths: npt.NDArray[np.int64]
    """[texts]: words of each."""


def _read(texts: Iterable[str], on_rows: Callable[[int], None]) -> tuple[list[_Chunk], list[str]]:
    """Return all texts, and the words that the numbers stand for, sorted.

    The order makes the same corpus give the same bytes, whatever the hash seed.
    """
    numbers: dict[str, int] = {}
    chunks = []
    source = iter(texts)
    while some := list(islice(source, _CHUNK)):
        tokens = tokenize(some)
        flat = [numbers.setdefault(word, len(numbers)) for words in tokens for word in words]
        lengths = np.array([len(words) for words in tokens], dtype=np.int64)
        chunks.append(_Chunk(np.array(flat, dtype=np.int32), lengths))
        on_rows(len(some))
    words = sorted(numbers)
    renumber = np.empty(len(words), dtype=np.int32)
    renumber[[numbers[word] for word in words]] = np.arange(len(words), dtype=np.int32)
    return [_Chunk(renumber[chunk.words], chunk.lengths) for chunk in chunks], words


def _score(chunks: list[_Chunk], vocabulary: int) -> dict[str, Any]:
    """Return bm25s's score matrix: for each word the rows it stands in, rising, and its scores there."""
    rows = sum(len(chunk.lengths) for chunk in chunks)
    mean = sum(len(chunk.words) for chunk in chunks) / rows
    texts_with = np.zeros(vocabulary, dtype=np.int64)
    for chunk in chunks:
        texts_with += np.bincount(_postings(chunk)[0], minlength=vocabulary)
    starts = np.concatenate(([0], np.cumsum(texts_with)))
    idf = np.log(1 + (rows - texts_with + 0.5) / (texts_with + 0.5))
    data = np.empty(starts[-1], dtype=np.float32)
    indices = np.empty(starts[-1], dtype=np.int32)
    free, first_row = starts[:-1].copy(), 0
    for chunk in chunks:
        words, texts, counts = _postings(chunk)
        # Postings come sorted by word: each goes to its word's free place, plus how many of that word
        # precede it.
        of_word = np.bincount(words, minlength=vocabulary)
        before = np.cumsum(of_word) - of_word
        place = free[words] + np.arange(len(words)) - before[words]
        data[place] = idf[words] * counts / (counts + K1 * (1 - B + B * chunk.lengths[texts] / mean))
        indices[place] = texts + first_row
        free += of_word
        first_row += len(chunk.lengths)
    return {"data": data, "indices": indices, "indptr": starts, "num_docs": rows}


def _postings(chunk: _Chunk) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return word, text and count of each word in each text of the chunk, by word, then text."""
    texts = len(chunk.lengths)
    keys = chunk.words * np.int64(texts) + np.repeat(np.arange(texts), chunk.lengths)
    unique, counts = np.unique(keys, return_counts=True)
    return unique // texts, unique % texts, counts
