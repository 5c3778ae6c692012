"""Malformed data: question files, corpora, and what search servers and their clients send.

Each reader gets files and bytes that are almost right. It may read them, and then what it returns keeps its
own promises, or refuse them with its typed error, which names the file; it never raises anything else.
"""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from searchrl.data import DataError
from searchrl.data.readers import read_examples
from searchrl.retrieval.corpus import Corpus, CorpusError, Passage
from searchrl.retrieval.lookup import read_passages
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.retrieval.wire import (
    MAX_DOCUMENTS,
    MAX_QUERIES,
    MAX_TOP_K,
    BadRequestError,
    parse_answer,
    parse_request,
    query_problem,
    render_answer,
)
from searchrl.trajectory import Document, Example

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

ROW = {
    "id": "a",
    "question": "Who?",
    "golden_answers": ["Ann"],
    "data_source": "set",
    "metadata": {"hops": 1},
    "prompt": [{"role": "user", "content": "Who?"}],
}
SEARCH_R1 = {
    "data_source": "nq",
    "prompt": [{"role": "user", "content": "Question: Who?"}],
    "ability": "fact",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["Ann"]}},
    "extra_info": {"split": "train", "index": 0},
}
PASSAGE = {"id": "0", "contents": '"Rome"\nOn the Tiber.'}
REQUEST = {"queries": ["rome"], "topk": 3, "return_scores": True}
ANSWER = {
    "result": [[{"document": PASSAGE, "score": 1.0}, {"document": {"id": 1, "contents": "x"}, "score": 0}]]
}

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 1.5, math.nan, math.inf, 10**400, "", " ", "\n", "x", "\0", "\ud800", "é"),
    *([], [[]], [""], [None], [1], ["x", ""], ["\udfff"], {}, {"id": "a"}, {"": None}, [{}]),
    *(
        [{"role": "user"}],
        [{"role": "bot", "content": "x"}],
        [{"role": "user", "content": 3}],
        {"role": "user"},
    ),
    *(
        [{"role": []}],
        [{"role": "assistant", "content": "x"}],
        {"ground_truth": None},
        "{",
        "[]",
        '{"hops": 1}',
    ),
    *({"ground_truth": {"target": None}}, {"ground_truth": {"target": [" "]}}, "x" * 5000),
)
LINES = (
    *(b"", b" ", b"\t", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b"nan", b"\xff", b"\xed\xa0\x80", b"{}{}"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\0", b'{"id": "\\ud800"}', b"\x1f\x8b\x08"),
    b"\xef\xbb\xbf{}",
)


def attempt(read: Callable[[], T], refusal: type[E]) -> T | E:
    """What was read, or the refusal."""
    try:
        return read()
    except refusal as error:
        return error


def mutate(random: Random, value: Any) -> Any:
    """The value with something in it dropped, replaced, doubled or wrapped; at any depth."""
    choice = random.random()
    if isinstance(value, dict) and value and choice < 0.8:
        key = random.choice(list(value))
        rest = {name: item for name, item in value.items() if name != key}
        if choice < 0.12:
            return rest
        if choice < 0.2:
            return rest | {key + "s": value[key]}
        return value | {key: mutate(random, value[key])}
    if isinstance(value, list) and value and choice < 0.6:
        at = random.randrange(len(value))
        return [*value[:at], *([mutate(random, value[at])] * random.randint(0, 2)), *value[at + 1 :]]
    if choice < 0.9:
        return random.choice(ODD)
    return [value]


def damage(random: Random, data: bytes) -> bytes:
    """The bytes cut short, or with some of them changed, dropped or repeated."""
    if not data or random.random() < 0.3:
        return data[: random.randint(0, len(data))]
    broken = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(broken))
        match random.randint(0, 2):
            case 0:
                broken[at] = random.randrange(256)
            case 1:
                del broken[at : at + random.randint(1, 8)]
            case _:
                broken[at:at] = broken[at : at + random.randint(1, 8)]
        if not broken:
            break
    return bytes(broken)


def _lines(random: Random, row: dict[str, Any], **different: str) -> bytes:
    """Three JSON lines, of which one was changed; sometimes one that is no row; sometimes damaged."""
    rows = [row | {name: f"{value}{n}" for name, value in different.items()} for n in range(3)]
    lines = [json.dumps(line).encode() for line in rows]
    at = random.randrange(len(lines))
    if random.random() < 0.7:
        lines[at] = json.dumps(mutate(random, rows[at]), ensure_ascii=random.random() < 0.9).encode(
            "utf-8", "surrogatepass"
        )
    if random.random() < 0.3:
        lines.insert(at, random.choice(LINES))
    data = b"\n".join(lines) + b"\n" * random.randint(0, 1)
    return damage(random, data) if random.random() < 0.3 else data


def check_jsonl(random: Random, folder: Path) -> str:
    """Question files, compressed or not."""
    data = _lines(random, ROW, id="q")
    suffix = random.choice((".jsonl", ".jsonl", ".jsonl.gz"))
    if suffix.endswith(".gz"):
        data = gzip.compress(data, mtime=0)
        data = damage(random, data) if random.random() < 0.5 else data
    path = folder / f"questions{suffix}"
    path.write_bytes(data)
    return _check_questions(path, random.choice(("", "", "prompt")))


def check_parquet(random: Random, folder: Path) -> str:
    """Question files in Parquet, ours and Search-R1's, with columns of other types, and damaged ones."""
    row = random.choice((ROW, SEARCH_R1))
    rows: list[Any] = [row | ({"id": f"q{n}"} if row is ROW else {}) for n in range(3)]
    if random.random() < 0.8:
        rows[random.randrange(3)] = mutate(random, rows[0])
    try:
        table = pa.Table.from_pylist([line if isinstance(line, dict) else {} for line in rows])
        if random.random() < 0.1:
            table = table.slice(0, 0)
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
        return "unwritable"  # such rows cannot be in a Parquet file
    data = buffer.getvalue()
    path = folder / "questions.parquet"
    path.write_bytes(damage(random, data) if random.random() < 0.3 else data)
    return _check_questions(path, random.choice(("", "", "prompt", "nowhere")))


def _check_questions(path: Path, prompt_column: str) -> str:
    examples = attempt(lambda: read_examples(path, prompt_column=prompt_column), DataError)
    if isinstance(examples, DataError):
        assert str(path) in str(examples)
        return "refused"
    assert examples
    assert len({example.id for example in examples}) == len(examples)
    for example in examples:
        _check_example(example)
        assert (example.prompt is not None) == bool(prompt_column)
    return "read"


def _check_example(example: Example) -> None:
    prompts = [text for message in example.prompt or () for text in (message.role, message.content)]
    for text in (example.id, example.question, example.data_source, *example.golden_answers, *prompts):
        assert text.strip()
        text.encode()
    assert example.golden_answers
    assert isinstance(example.hops, int)
    assert all(isinstance(passage, str) for passage in example.gold_passages)


def check_corpus(random: Random, folder: Path) -> str:
    """Corpora: opened, every passage read, passages looked up by their ids."""
    path = folder / "corpus.jsonl"
    path.write_bytes(_lines(random, PASSAGE, id="p"))
    for suffix in (".offsets.npy", ".offsets.json"):
        derived = path.with_name(path.name + suffix)
        derived.unlink(missing_ok=True)
        if random.random() < 0.1:
            derived.write_bytes(random.choice(LINES))
    passages = attempt(lambda: _passages(path), CorpusError)
    if isinstance(passages, CorpusError):
        assert str(path) in str(passages)
        return "refused"
    for passage in passages:
        passage.id.encode()
        passage.contents.encode()
    assert passages[-1].id in read_passages(path, [passages[-1].id])
    return "read"


def _passages(path: Path) -> list[Passage]:
    with closing(Corpus(path)) as corpus:
        return [corpus[row] for row in range(len(corpus))]


def check_answer(random: Random, folder: Path) -> str:
    """What a search server answers."""
    del folder
    body = (
        json.dumps(mutate(random, ANSWER)).encode() if random.random() < 0.7 else json.dumps(ANSWER).encode()
    )
    if random.random() < 0.3:
        body = random.choice((damage(random, body), random.choice(LINES)))
    queries, top_k = random.choice(((1, 3), (1, 1), (2, 3)))
    results = attempt(lambda: parse_answer(body, num_queries=queries, top_k=top_k), RetrievalError)
    if isinstance(results, RetrievalError):
        assert results.kind is FailureKind.BAD_RESPONSE
        assert "wire format" in str(results)
        return "refused"
    assert len(results) == queries
    for documents in results:
        assert len(documents) <= top_k
        for document in documents:
            _check_document(document)
    answers = [[(_line(document), document.score) for document in found] for found in results]
    again = parse_answer(render_answer(answers, return_scores=True), num_queries=queries, top_k=top_k)
    assert again == results
    return "read"


def _line(document: Document) -> bytes:
    return json.dumps({"id": document.id, "contents": document.contents}).encode()


def _check_document(document: Document) -> None:
    document.id.encode()
    document.contents.encode()
    assert math.isfinite(document.score)


def check_request(random: Random, folder: Path) -> str:
    """What a client sends to our server."""
    del folder
    body = json.dumps(mutate(random, REQUEST)).encode()
    if random.random() < 0.3:
        body = random.choice((damage(random, body), random.choice(LINES)))
    request = attempt(lambda: parse_request(body), BadRequestError)
    if isinstance(request, BadRequestError):
        assert str(request)
        assert 400 <= request.status < 500
        return "refused"
    assert 0 < len(request.queries) <= MAX_QUERIES
    assert all(query_problem(query) is None for query in request.queries)
    assert 1 <= request.top_k <= MAX_TOP_K
    assert len(request.queries) * request.top_k <= MAX_DOCUMENTS
    assert isinstance(request.return_scores, bool)
    return "read"


CHECKS: dict[str, Callable[[Random, Path], str]] = {
    "questions, JSONL": check_jsonl,
    "questions, Parquet": check_parquet,
    "corpus": check_corpus,
    "search answers": check_answer,
    "search requests": check_request,
}
"""Each draws one malformed input, gives it to its reader and returns what came of it."""
