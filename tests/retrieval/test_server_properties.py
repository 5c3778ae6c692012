"""Properties of a running server: any body gets its answer, and batching changes none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp

from searchrl.config import IndexKind
from searchrl.retrieval.app import Service, create_app
from searchrl.retrieval.build import build_index
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.encoder import EncoderFamily
from searchrl.retrieval.loading import load_index

pytestmark = pytest.mark.integration

Serve = Callable[[ASGIApp], str]

KEYS = st.sampled_from(["queries", "query", "topk", "return_scores", "other"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner), max_leaves=8
)
QUERY = st.sampled_from(
    ["tea", "capital of Spain", "東京", " ", "", "a\0b", "\ud800", "x" * 2048, "x" * 2049]
)
NEAR = st.fixed_dictionaries(
    {},
    optional={
        "queries": st.lists(QUERY | SCALARS, max_size=4) | SCALARS,
        "query": QUERY | SCALARS,
        "topk": st.integers(-2, 102)
        | st.sampled_from([10**6, 10**30, "3", " 3 ", "-3", "3.0", "", "٣"])
        | SCALARS,
        "return_scores": st.booleans() | SCALARS,
        "other": SCALARS,
    },
)
VALID = st.fixed_dictionaries(
    {"queries": st.lists(st.sampled_from(["tea", "gold", "capital of Spain"]), min_size=1, max_size=4)},
    optional={"topk": st.integers(1, 100) | st.none(), "return_scores": st.booleans()},
)


def mutated(body: bytes, at: int, with_: bytes) -> bytes:
    """``body`` with one place overwritten."""
    place = at % (len(body) + 1)
    return body[:place] + with_ + body[place + len(with_) :]


BODIES = (
    st.binary(max_size=40)
    | (ANYTHING | NEAR | VALID).map(json.dumps).map(str.encode)
    | st.builds(mutated, VALID.map(json.dumps).map(str.encode), st.integers(0, 200), st.binary(max_size=3))
)


def is_valid(body: bytes) -> bool:
    """PROTOCOL's request, said once more and differently."""
    try:
        record = json.loads(body)
    except ValueError:
        return False
    match record:
        case {"queries": list(queries), **rest} if queries and "query" not in rest:
            pass
        case {"query": query, **rest} if "queries" not in rest:
            queries = [query]
        case _:
            return False
    top_k = record.get("topk")
    if isinstance(top_k, str) and top_k.strip() in {str(number) for number in range(1, 101)} | {
        f"{zeros}{number}" for number in range(1, 101) for zeros in ("0", "00")
    }:
        top_k = int(top_k)
    return (
        all(isinstance(query, str) and is_query(query) for query in queries)
        and (top_k is None or (type(top_k) is int and 1 <= top_k <= 100))
        and type(record.get("return_scores", False)) is bool
    )


def is_query(text: str) -> bool:
    return (
        text.strip() != ""
        and len(text) <= 2048
        and all(character != "\0" and not 0xD800 <= ord(character) < 0xE000 for character in text)
    )


@pytest.fixture(scope="module")
def corpus(corpus_path: Path) -> Corpus:
    return Corpus(corpus_path)


@pytest.fixture(scope="module")
def client(serve: Serve, bm25_directory: Path, corpus: Corpus) -> Iterator[httpx.Client]:
    service = Service(index=load_index(bm25_directory, corpus), corpus=corpus, fingerprint="f")
    with httpx.Client(base_url=serve(create_app(service)), trust_env=False) as client:
        yield client


@settings(max_examples=250, deadline=None)
@given(BODIES)
def test_any_body_gets_the_answer_it_deserves_and_does_no_harm(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/retrieve", content=body)
    record = answer.json()
    if is_valid(body):
        assert answer.status_code == 200, record
        request = json.loads(body)
        assert len(record["result"]) == len(request.get("queries", [None]))
    else:
        assert 400 <= answer.status_code < 500, record
        assert isinstance(record["error"], str)
        assert record["error"]
    after = client.post("/retrieve", json={"query": "tea"})
    assert after.json()["result"][0][0]["id"] == "d46"
    assert client.get("/health").json()["status"] == "ok"


Pair = tuple[str, str, IndexKind]


@pytest.fixture(scope="module", params=[IndexKind.bm25, IndexKind.dense, IndexKind.hybrid])
def pair(
    request: pytest.FixtureRequest,
    serve: Serve,
    corpus: Corpus,
    encoder_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    """Two servers of one index: the usual one, and one that computes each query by itself."""
    folder = tmp_path_factory.mktemp("pair") / "index"
    encoder: dict[str, Any] = {}
    if request.param is not IndexKind.bm25:
        encoder = {"encoder_path": encoder_path, "encoder_family": EncoderFamily.E5}
    build_index(corpus.path, folder, kind=request.param, **encoder)

    def service() -> Service:  # an index is used by one thread at a time, so each server has its own
        return Service(index=load_index(folder, corpus), corpus=corpus, fingerprint="f")

    usual = serve(create_app(service(), cache_size=6, max_batch=5))
    reference = serve(create_app(service(), max_batch=1, cache_size=0, deduplicate=False))
    return usual, reference, request.param


ASKED = st.lists(
    st.tuples(
        st.lists(
            st.sampled_from(
                [
                    "capital of France",
                    "capital of Italy",
                    "river",
                    "the highest mountain of the Alps",
                    "Who composed nine symphonies, and who the Brandenburg Concertos in a long question?",
                    "東京 🦊",
                    "xyzzy",
                    "planet with rings",
                ]
            ),
            min_size=1,
            max_size=6,
        ),
        st.sampled_from([1, 3, 50]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ASKED)
def test_batched_cached_and_joined_answers_are_those_of_single_queries(
    pair: Pair, asked: list[tuple[list[str], int]]
) -> None:
    usual, reference, kind = pair
    expected = [[single(reference, query, top_k) for query in queries] for queries, top_k in asked]

    async def scenario() -> list[bytes]:
        async with httpx.AsyncClient(base_url=usual, trust_env=False) as client:
            answers = await asyncio.gather(
                *(
                    client.post("/retrieve", json={"queries": q, "topk": k, "return_scores": True})
                    for q, k in asked
                )
            )
        return [answer.content for answer in answers]

    for answer, parts in zip(asyncio.run(scenario()), expected, strict=True):
        reference_answer = b'{"result":[' + b",".join(parts) + b"]}"
        if kind is IndexKind.dense:
            assert_equal_but_for_rounding(json.loads(answer), json.loads(reference_answer))
        else:
            assert answer == reference_answer


def assert_equal_but_for_rounding(answer: Any, reference: Any) -> None:
    """A score's last bits depend on the shape of the batch in which the encoder multiplied matrices."""
    for hits, expected in zip(answer["result"], reference["result"], strict=True):
        assert [hit["document"] for hit in hits] == [hit["document"] for hit in expected]
        scores = [hit["score"] for hit in expected]
        assert [hit["score"] for hit in hits] == pytest.approx(scores, rel=1e-5, abs=1e-6)


_SINGLE: dict[tuple[str, str, int], bytes] = {}


def single(url: str, query: str, top_k: int) -> bytes:
    """The reference's answer to one query, without the envelope."""
    key = (url, query, top_k)
    if key not in _SINGLE:
        answer = httpx.post(
            f"{url}/retrieve", json={"query": query, "topk": top_k, "return_scores": True}, trust_env=False
        )
        assert answer.status_code == 200
        _SINGLE[key] = answer.content.removeprefix(b'{"result":[').removesuffix(b"]}")
    return _SINGLE[key]
