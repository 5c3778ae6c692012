from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.retrieval.wire import BadRequestError, SearchRequest, parse_answer, parse_request, render_answer
from searchrl.trajectory import Document

TEXT = st.text(st.characters(codec="utf-8"))
DOCUMENTS = st.lists(
    st.lists(
        st.builds(Document, id=TEXT, contents=TEXT, score=st.floats(allow_nan=False, allow_infinity=False)),
        max_size=4,
        unique_by=lambda document: (document.id, document.contents),
    ),
    max_size=4,
)


@given(DOCUMENTS, st.booleans())
def test_both_nestings_round_trip(results: list[list[Document]], return_scores: bool) -> None:
    lines = [
        [(json.dumps({"id": d.id, "contents": d.contents}).encode(), d.score) for d in documents]
        for documents in results
    ]
    body = render_answer(lines, return_scores=return_scores)
    expected = [
        [Document(id=d.id, contents=d.contents, score=d.score if return_scores else 0.0) for d in documents]
        for documents in results
    ]
    assert parse_answer(body, num_queries=len(results), top_k=4) == expected


def test_the_two_nestings_letter_by_letter() -> None:
    line = b'{"id":"7","contents":"x"}'
    assert json.loads(render_answer([[(line, 0.5)], []], return_scores=True)) == {
        "result": [[{"document": {"id": "7", "contents": "x"}, "score": 0.5}], []]
    }
    assert json.loads(render_answer([[(line, 0.5)], []], return_scores=False)) == {
        "result": [[{"id": "7", "contents": "x"}], []]
    }


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", 'no list under "result"'),
        (b'{"result": null}', 'no list under "result"'),
        (b'{"result": []}', "0 result lists for 1 queries"),
        (b'{"result": [[], []]}', "2 result lists for 1 queries"),
        (b'{"result": [{"id": "1", "contents": "x"}]}', "a result is dict"),
        (b'{"result": [["text"]]}', "a document is str"),
        (b'{"result": [[{"document": "text", "score": 1}]]}', "a document is str"),
        (b'{"result": [[{"id": "1", "text": "x"}]]}', r"its keys are \['id', 'text'\]"),
        (b'{"result": [[{"document": {"id": "1", "contents": null}, "score": 1}]]}', "a document without"),
        (b'{"result": [[{"document": {"id": "1", "contents": "x"}, "score": "high"}]]}', "a score is str"),
        (b'{"result": [[[{"id": "1", "contents": "x"}], [0.5]]]}', "a document is list"),
        (b'{"result": [[null]]}', "a document is NoneType"),
        (b'{"result": [[{"id": "1", "contents": "x"}, {"id": 1, "contents": "x"}]]}', "a document twice"),
        (b'{"result": [[{"document": {"id": "1", "contents": "x"}, "score": NaN}]]}', "not a finite"),
        (b'{"result": [[{"document": {"id": "1", "contents": "x"}, "score": -Infinity}]]}', "not a finite"),
        (
            b'{"result": [[{"document": {"id": "1", "contents": "x"}, "score": 1%b}]]}' % (b"0" * 400),
            "finite",
        ),
        (b'{"result": [[{"id": "1", "contents": "\xff"}]]}', "no JSON"),
    ],
)
def test_an_answer_that_fits_neither_nesting_is_a_typed_error(body: bytes, reason: str) -> None:
    with pytest.raises(RetrievalError, match=reason) as caught:
        parse_answer(body, num_queries=1, top_k=3)
    assert caught.value.kind is FailureKind.BAD_RESPONSE


def test_more_documents_than_asked_for_are_cut_and_numeric_ids_are_strings() -> None:
    body = json.dumps({"result": [[{"id": i, "contents": "x"} for i in range(5)]]}).encode()
    (documents,) = parse_answer(body, num_queries=1, top_k=2)
    assert [document.id for document in documents] == ["0", "1"]


def test_a_lone_surrogate_becomes_a_character_that_can_be_encoded() -> None:
    escaped = rb'{"result": [[{"id": "\ud800", "contents": "a\udc00b \ud83e\udd8a RAW"}]]}'
    body = escaped.replace(b"RAW", "\ud800".encode(errors="surrogatepass"))
    (documents,) = parse_answer(body, num_queries=1, top_k=1)
    assert documents == [Document(id="\ufffd", contents="a\ufffdb \U0001f98a \ufffd", score=0.0)]


def test_chunks_of_one_article_are_no_duplicates() -> None:
    body = b'{"result": [[{"id": "1", "contents": "x"}, {"id": "1", "contents": "y"}]]}'
    assert len(parse_answer(body, num_queries=1, top_k=3)[0]) == 2


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"queries": ["a", "b"]}, (["a", "b"], 3, False)),
        ({"queries": ["a"], "topk": None, "return_scores": True}, (["a"], 3, True)),
        ({"queries": ["a"], "topk": 100}, (["a"], 100, False)),
        ({"queries": ["a"], "topk": "5"}, (["a"], 5, False)),
        ({"query": "a", "topk": 1}, (["a"], 1, False)),
        ({"queries": ["a"], "unknown": 1}, (["a"], 3, False)),
    ],
)
def test_good_requests(body: object, expected: tuple[list[str], int, bool]) -> None:
    queries, top_k, return_scores = expected
    wanted = SearchRequest(queries=queries, top_k=top_k, return_scores=return_scores)
    assert parse_request(json.dumps(body).encode()) == wanted


JSON = st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5)


@settings(max_examples=50)
@given(st.binary(max_size=20) | JSON.map(json.dumps).map(str.encode))
def test_no_body_does_more_than_be_refused(body: bytes) -> None:
    with pytest.raises(BadRequestError):
        parse_request(body)
