"""The question sets of ``RUC-NLPIR/FlashRAG_datasets``: which files, how large, what is peculiar to each.

Every set is a folder of ``train.jsonl``, ``dev.jsonl``, ``test.jsonl``, as far as it has them, with rows
``{"id", "question", "golden_answers", "metadata"}``; some have no ``metadata``. Sizes are those that the
collection's own table gives. A source is tested on ``test``, or on ``dev`` where it has no ``test``, whose
answers are then not public; Search-R1 evaluates on the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from searchrl.data.errors import DataError
from searchrl.data.rows import Row, field, mapping, published_answers, string

REPOSITORY = "RUC-NLPIR/FlashRAG_datasets"
HUB = "hub"
"""The origin that means the model hub; any other is a folder."""

SPLITS = ("train", "test")

# Paragraphs that came with the questions: tens of kilobytes a row, and here the policy searches by itself.
_PARAGRAPHS = frozenset(("context", "paragraphs", "paragraph_text"))
_MUSIQUE_ID = re.compile(r"(\d)hop")


@dataclass(kw_only=True, slots=True, frozen=True)
class Source:
    """One published set: which of its files is the test set, and the rows of both; 0: it has no such file."""

    train: int
    tested_on: str
    test: int
    hops: int | None
    """Facts that any of its questions needs; None: the rows say."""


SOURCES = {
    "nq": Source(train=79_168, tested_on="test", test=3_610, hops=1),
    "triviaqa": Source(train=78_785, tested_on="test", test=11_313, hops=1),
    "popqa": Source(train=0, tested_on="test", test=14_267, hops=1),
    "hotpotqa": Source(train=90_447, tested_on="dev", test=7_405, hops=2),
    "2wikimultihopqa": Source(train=15_000, tested_on="dev", test=12_576, hops=None),
    "musique": Source(train=19_938, tested_on="dev", test=2_417, hops=None),
    "bamboogle": Source(train=0, tested_on="test", test=125, hops=2),
}
DEFAULT_SOURCES = {"train": ("nq", "hotpotqa"), "test": tuple(SOURCES)}
"""What the published experiment trains and is tested on."""


def published(source: str, split: str) -> tuple[str, int]:
    """The published split that serves as ``split``, and its number of rows.

    Raises ``DataError`` for a source that is not among the seven, or that has no such split.
    """
    if source not in SOURCES:
        raise DataError(
            f"no source is called {source!r}; there are {', '.join(SOURCES)}. A set of your own needs no "
            "preparing: write its rows as docs/data.md has them"
        )
    known = SOURCES[source]
    if split == "test":
        return known.tested_on, known.test
    if not known.train:
        trainable = ", ".join(name for name, other in SOURCES.items() if other.train)
        raise DataError(f"{source} has no training questions; choose from {trainable}")
    return "train", known.train


def locate(source: str, published_split: str, origin: str) -> Path:
    """The file of a source: from the hub, downloaded unless its cache has it, or in a local copy.

    Raises ``DataError`` if it cannot be had; the message says how to do without the hub.
    """
    name = f"{source}/{published_split}.jsonl"
    if origin != HUB:
        path = Path(origin).expanduser() / name
        if not path.is_file():
            raise DataError(
                f"{path} does not exist; --from names a folder laid out like {REPOSITORY}, with {name} in it"
            )
        return path
    from huggingface_hub import hf_hub_download

    # Not exported as public, but the base of the hub's own errors and of a broken connection, whichever
    # client the library is built on.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # only imported there

    try:
        return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset"))
    except (HTTPError, OSError) as error:  # the second: offline and not in the cache, a full disk
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{name} of {REPOSITORY} cannot be downloaded ({type(error).__name__}: {reason}). To do without "
            f"the hub, copy its files by another way, this one to DIR/{name}, and add --from DIR"
        ) from error


def to_row(source: str, published_split: str, number: int, row: Row, where: str) -> tuple[Row, int]:
    """Row ``number`` (from 0) of a source's file in our form, and how many blank answers were left out.

    The question is stripped and gets a final ``?`` if it has none, as Search-R1 does, so that both train on
    the same words. The id is ``SOURCE_SPLIT_NUMBER``. Metadata is kept but for paragraphs, with ``hops``
    added where it is known, and ``source_id`` where the set has ids of its own.

    Raises ``DataError`` naming file, line and field.
    """
    question = string(field(row, "question", where), "question", where).strip()
    given = field(row, "golden_answers", where)
    golds = published_answers(given, "golden_answers", where)
    metadata = mapping(row.get("metadata") or {}, "metadata", where)
    source_id = str(row.get("id", ""))
    kept: Row = {"hops": count} if (count := hops(source, source_id, metadata)) else {}
    kept |= without_paragraphs(metadata)
    if source_id and source_id != f"{published_split}_{number}":
        kept["source_id"] = source_id
    converted: Row = {
        "id": f"{source}_{published_split}_{number}",
        "question": question if question.endswith("?") else question + "?",
        "golden_answers": list(golds),
        "data_source": source,
        "metadata": kept,
    }
    return converted, len(given) - len(golds) if isinstance(given, list) else 0


def hops(source: str, source_id: str, metadata: Row) -> int | None:
    """How many facts a question needs, as far as its set says so; None: it does not.

    - NQ, TriviaQA, PopQA: 1; HotpotQA (arXiv 1809.09600) and Bamboogle (arXiv 2210.03350): 2, as they were
      made.
    - 2WikiMultihopQA (arXiv 2011.01060): 2; 4 for the type ``bridge_comparison``, which compares the ends of
      two bridges.
    - MuSiQue (arXiv 2108.00573): the steps of ``question_decomposition``, else the number that its own ids
      begin with (``3hop1__…``).
    """
    if source == "2wikimultihopqa":
        return 4 if metadata.get("type") == "bridge_comparison" else 2
    if source == "musique":
        steps = metadata.get("question_decomposition")
        if isinstance(steps, list) and steps:
            return len(steps)
        match = _MUSIQUE_ID.match(source_id)
        return int(match[1]) if match else None
    return SOURCES[source].hops


def without_paragraphs(metadata: Row) -> Row:
    """The metadata without paragraphs, at any depth; titles and what else is small stay."""
    return {name: _pruned(value) for name, value in metadata.items() if name not in _PARAGRAPHS}


def _pruned(value: object) -> object:
    if isinstance(value, dict):
        return without_paragraphs(value)
    return [_pruned(item) for item in value] if isinstance(value, list) else value
