"""The wire format of ``POST /retrieve``, both sides of it.

{"queries": [str], "topk": int | null, "return_scores": bool}     or {"query": str, …} for one
return_scores true:   {"result": [[{"document": {"id", "contents"}, "score": float}]]}
return_scores false:  {"result": [[{"id", "contents"}]]}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.trajectory import Document

# Search-R1's client asks for a whole training batch at once: 512 questions x 5 episodes in its recipe.
MAX_QUERIES = 4096
MAX_QUERY_CHARS = 2048
MAX_BODY_BYTES = MAX_QUERIES * MAX_QUERY_CHARS
MAX_TOP_K = 100
MAX_DOCUMENTS = 4 * MAX_QUERIES
"""Queries times topk of one request: bounds the size of an answer, about 12 MB of 100-word passages."""
DEFAULT_TOP_K = 3

INDEX_HEADER = "X-Searchrl-Index"
"""On every answer of ``/retrieve``: the fingerprint of the index that gave it."""
TIMEOUT_HEADER = "X-Searchrl-Timeout-Ms"
"""Optional in a request: for how many milliseconds from now the client will wait."""
TOKEN_VARIABLE = "SEARCHRL_RETRIEVAL_TOKEN"
"""Environment variable with the bearer token that a server demands and a client sends."""

Answer: TypeAlias = list[tuple[bytes, float]]
"""What answers one query: (corpus line, score) pairs, best first."""

_LARGEST = sys.float_info.max


def is_token(text: str) -> bool:
    """Whether ``text`` can be sent as a bearer token: printable ASCII without spaces, and not empty."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


class BadRequestError(ValueError):
    """A request that is refused; ``status`` is the HTTP status, the message its reason.

    ``also`` joins the reason in the answer's JSON object.
    """

    def __init__(self, reason: str, *, status: int = 422, also: dict[str, object] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.also = also or {}


@dataclass(kw_only=True, slots=True, frozen=True)
class SearchRequest:
    """A valid request."""

    queries: list[str]
    top_k: int
    return_scores: bool


def parse_request(body: bytes) -> SearchRequest:
    """Check a request's body; raise `BadRequestError` with the reason if it is not one."""
    try:
        record = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"malformed JSON: {error}", status=400) from error
    if not isinstance(record, dict):
        raise BadRequestError("the body must be a JSON object")
    if ("queries" in record) == ("query" in record):
        raise BadRequestError('give either "queries" (a list of strings) or "query" (a string)')
    queries = record["queries"] if "queries" in record else [record["query"]]
    if not isinstance(queries, list):
        raise BadRequestError('"queries" must be a list of strings')
    if not queries:
        # Search-R1's client asks with an empty list whenever no episode searches, and reads "result" without
        # a look at the status.
        raise BadRequestError('"queries" is empty', also={"result": []})
    if len(queries) > MAX_QUERIES:
        raise BadRequestError(f"{len(queries)} queries; at most {MAX_QUERIES} a request", status=413)
    for i, query in enumerate(queries):
        reason = query_problem(query)
        if reason is not None:
            raise BadRequestError(f"query {i} {reason}")
    return_scores = record.get("return_scores", False)
    if not isinstance(return_scores, bool):
        raise BadRequestError('"return_scores" must be true or false')
    top_k = _top_k(record.get("topk"))
    if len(queries) * top_k > MAX_DOCUMENTS:
        raise BadRequestError(
            f"{len(queries)} queries times topk {top_k}; at most {MAX_DOCUMENTS} documents a request",
            status=413,
        )
    return SearchRequest(queries=queries, top_k=top_k, return_scores=return_scores)


def query_problem(query: object) -> str | None:
    """Return why ``query`` cannot be searched for, None if it can."""
    if not isinstance(query, str):
        return "is not a string"
    if not query.strip():
        return "is empty"
    if len(query) > MAX_QUERY_CHARS:
        return f"has {len(query)} characters; at most {MAX_QUERY_CHARS}"
    if "\0" in query:
        return "contains a NUL character"
    try:
        query.encode()
    except UnicodeEncodeError:
        return "contains a lone surrogate"
    return None


def _top_k(value: object) -> int:
    if value is None:
        return DEFAULT_TOP_K
    if (
        isinstance(value, str) and len(value) <= 12
    ):  # servers built on pydantic accept "3", so clients send it
        digits = value.strip().removeprefix("-")
        if digits.isascii() and digits.isdigit():
            value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadRequestError('"topk" must be an integer')
    if not 1 <= value <= MAX_TOP_K:
        raise BadRequestError(f'"topk" must be from 1 to {MAX_TOP_K}')
    return value


def render_answer(results: Sequence[Answer], *, return_scores: bool) -> bytes:
    """Return the body for each query's (corpus line, score) pairs; a line is JSON and is spliced in."""
    lists = []
    for result in results:
        if return_scores:
            items = [b'{"document":%b,"score":%b}' % (raw, repr(score).encode()) for raw, score in result]
        else:
            items = [raw for raw, _ in result]
        lists.append(b"[" + b",".join(items) + b"]")
    return b'{"result":[' + b",".join(lists) + b"]}"


def parse_answer(body: bytes, *, num_queries: int, top_k: int) -> list[list[Document]]:
    """Return each query's documents from an answer in either nesting, at most ``top_k`` each.

    Without scores the score is 0.0. A lone surrogate, which no tokenizer takes, becomes U+FFFD: it is a flaw
    of one passage that no other attempt would mend. Raises `RetrievalError` (bad_response) if the answer fits
    neither nesting, a score is not finite, or a passage comes twice in one result, as FAISS's id -1 does.
    """
    try:
        record = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _bad(f"no JSON: {error}") from error
    results = record.get("result") if isinstance(record, dict) else None
    if not isinstance(results, list):
        raise _bad('no list under "result"')
    if len(results) != num_queries:
        raise _bad(f"{len(results)} result lists for {num_queries} queries")
    documents = []
    for result in results:
        if not isinstance(result, list):
            raise _bad(f"a result is {type(result).__name__}, not a list")
        found = [_document(item) for item in result[:top_k]]
        if len({(document.id, document.contents) for document in found}) < len(found):
            raise _bad(f"a result holds a document twice; its ids are {[document.id for document in found]}")
        documents.append(found)
    return documents


def _document(item: object) -> Document:
    outer = _object(item)
    inner = _object(outer["document"]) if "document" in outer else outer
    score = outer.get("score", 0.0) if "document" in outer else 0.0
    # Search-R1's BM25 and web servers send no id.
    id_, contents = inner.get("id", ""), inner.get("contents")
    if isinstance(id_, int) and not isinstance(id_, bool):
        id_ = str(id_)
    if not isinstance(id_, str) or not isinstance(contents, str):
        raise _bad(f'a document without the strings "id" and "contents"; its keys are {sorted(inner)[:8]}')
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise _bad(f"a score is {type(score).__name__}, not a number")
    if not -_LARGEST <= score <= _LARGEST:  # false for NaN; an int may be too large for a float
        raise _bad("a score is not a finite number")
    return Document(id=encodable(id_), contents=encodable(contents), score=float(score))


def encodable(text: str) -> str:
    """The text with every lone surrogate, which no tokenizer takes, as U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _bad(f"a document is {type(value).__name__}, not an object")
    return value


def _bad(reason: str) -> RetrievalError:
    message = f"the search server's answer is not in the wire format: {reason}"
    return RetrievalError(message, kind=FailureKind.BAD_RESPONSE)
