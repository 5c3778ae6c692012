"""Passages of a corpus by their ids."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from searchrl.retrieval.corpus import Corpus, CorpusError
from searchrl.trajectory import Document


def read_passages(path: str | Path, ids: Iterable[str]) -> dict[str, Document]:
    """The passages with these ids.

    Where a passage's id is its row, as in wiki-18, it is read at once; for the others the corpus is gone
    through, until all are found.

    Raises:
        CorpusError: the file is no corpus, or does not hold one of the ids.
    """
    missing = set(ids)
    found: dict[str, Document] = {}
    with closing(Corpus(path)) as corpus:

        def take(row: int) -> None:
            passage = corpus[row]
            if passage.id in missing:
                missing.remove(passage.id)
                found[passage.id] = Document(id=passage.id, contents=passage.contents, score=1.0)

        for id_ in sorted(missing):
            if id_.isdecimal() and int(id_) < len(corpus):
                take(int(id_))
        for row in range(len(corpus)):
            if not missing:
                break
            take(row)
    if missing:
        raise CorpusError(
            f"{path} holds no passage {min(missing)!r} ({len(missing)} ids are missing); the questions name "
            "passages of another corpus"
        )
    return found
