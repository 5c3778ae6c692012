from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import httpx
import pytest
from starlette.types import ASGIApp

from retrieval.clients import post, samples
from searchrl import __version__
from searchrl.retrieval import app as app_module
from searchrl.retrieval.app import Service, create_app
from searchrl.retrieval.types import Hit, Index
from searchrl.retrieval.wire import (
    INDEX_HEADER,
    MAX_BODY_BYTES,
    MAX_QUERIES,
    MAX_QUERY_CHARS,
    MAX_TOP_K,
    TIMEOUT_HEADER,
)

Serve = Callable[[ASGIApp], str]


def test_an_answer_in_both_nestings(http: httpx.Client, contents: list[str]) -> None:
    scored = post(http, queries=["capital of France", "noble gas"], topk=2, return_scores=True).json()
    plain = post(http, queries=["capital of France", "noble gas"], topk=2).json()
    assert scored["result"][0][0]["document"] == {"id": "d0", "contents": contents[0]}
    assert scored["result"][0][0]["score"] > scored["result"][0][1]["score"] > 0
    assert plain == {"result": [[item["document"] for item in items] for items in scored["result"]]}
    assert plain["result"][1][0]["id"] == "d31"


def test_a_single_query_numeric_strings_and_unknown_words(http: httpx.Client) -> None:
    assert len(post(http, query="capital", topk="2").json()["result"][0]) == 2
    assert len(post(http, query="capital").json()["result"][0]) == 3
    assert post(http, queries=["xyzzy", "tea"]).json()["result"][0] == []


def test_unicode_survives(http: httpx.Client, contents: list[str]) -> None:
    assert post(http, query="東京 emoji 🦊").json()["result"][0][0]["contents"] == contents[49]


BAD: list[tuple[str, bytes, int, str]] = [
    ("malformed", b'{"queries": [', 400, "malformed JSON"),
    ("not UTF-8", b'{"queries": ["\xff"]}', 400, "malformed JSON"),
    ("deeply nested", b"[" * 200_000, 400, "malformed JSON"),
    ("empty body", b"", 400, "malformed JSON"),
    ("no object", b'["a"]', 422, "must be a JSON object"),
    ("no field", b"{}", 422, 'give either "queries"'),
    ("both fields", b'{"query": "a", "queries": ["a"]}', 422, 'give either "queries"'),
    ("string for list", b'{"queries": "a"}', 422, "must be a list"),
    ("empty list", b'{"queries": []}', 422, "is empty"),
    ("number for query", b'{"queries": ["a", 1]}', 422, "query 1 is not a string"),
    ("null query", b'{"query": null}', 422, "query 0 is not a string"),
    ("empty query", b'{"queries": ["a", ""]}', 422, "query 1 is empty"),
    ("blank query", b'{"query": " \\n"}', 422, "query 0 is empty"),
    ("NUL", b'{"query": "a\\u0000b"}', 422, "NUL"),
    ("lone surrogate", b'{"query": "a\\ud800b"}', 422, "lone surrogate"),
    ("long query", json.dumps({"query": "a" * (MAX_QUERY_CHARS + 1)}).encode(), 422, "at most 2048"),
    ("many queries", json.dumps({"queries": ["a"] * (MAX_QUERIES + 1)}).encode(), 413, "at most 4096"),
    ("many documents", json.dumps({"queries": ["a"] * 512, "topk": 100}).encode(), 413, "at most 16384"),
    ("large body", b" " * (MAX_BODY_BYTES + 1), 413, "larger than"),
    ("topk 0", b'{"query": "a", "topk": 0}', 422, "from 1 to"),
    ("topk -1", b'{"query": "a", "topk": -1}', 422, "from 1 to"),
    ("topk large", f'{{"query": "a", "topk": {MAX_TOP_K + 1}}}'.encode(), 422, "from 1 to"),
    ("topk huge", b'{"query": "a", "topk": ' + b"9" * 5000 + b"}", 400, "malformed JSON"),
    ("topk 1e9", b'{"query": "a", "topk": 1e9}', 422, "must be an integer"),
    ("topk float", b'{"query": "a", "topk": 2.5}', 422, "must be an integer"),
    ("topk bool", b'{"query": "a", "topk": true}', 422, "must be an integer"),
    ("topk word", b'{"query": "a", "topk": "three"}', 422, "must be an integer"),
    ("topk string -1", b'{"query": "a", "topk": "-1"}', 422, "from 1 to"),
    ("topk NaN", b'{"query": "a", "topk": NaN}', 422, "must be an integer"),
    ("return_scores", b'{"query": "a", "return_scores": "yes"}', 422, "true or false"),
]


@pytest.mark.parametrize(("body", "status", "reason"), [case[1:] for case in BAD], ids=[c[0] for c in BAD])
def test_bad_input_is_refused_and_does_no_harm(
    http: httpx.Client, body: bytes, status: int, reason: str
) -> None:
    answer = http.post("/retrieve", content=body)
    assert answer.status_code == status
    assert reason in answer.json()["error"]
    assert post(http, query="tea").json()["result"][0][0]["id"] == "d46"


def test_a_large_body_without_a_declared_length_is_refused(http: httpx.Client) -> None:
    chunks = (b" " * (1 << 20) for _ in range(10))
    assert http.post("/retrieve", content=chunks).status_code == 413


def test_unknown_paths_and_methods_are_refused_in_json(http: httpx.Client) -> None:
    assert http.get("/retrieve").status_code == 405
    assert http.post("/nothing").json() == {"error": "Not Found"}


def test_a_stalled_body_is_given_up(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "BODY_TIMEOUT_S", 0.2)

    async def scenario() -> httpx.Response:
        async def body() -> AsyncIterator[bytes]:
            yield b'{"queries"'
            await asyncio.sleep(1)
            yield b': ["tea"]}'

        async with httpx.AsyncClient(base_url=http.base_url, trust_env=False) as client:
            return await client.post("/retrieve", content=body())

    answer = asyncio.run(scenario())
    assert answer.status_code == 408
    assert "did not arrive" in answer.json()["error"]


def test_health_names_what_is_served(http: httpx.Client) -> None:
    health = http.get("/health").json()
    assert 0 < health.pop("uptime_s") < 1000
    assert health == {
        "status": "ok",
        "index": "f",
        "rows": 50,
        "shuffle_seed": None,
        "version": __version__,
        "queue": 0,
        "computing_s": 0.0,
    }


def test_every_answer_names_its_index(http: httpx.Client) -> None:
    assert post(http, query="tea").headers[INDEX_HEADER] == "f"
    assert post(http, query="").headers[INDEX_HEADER] == "f"


def shown(http: httpx.Client, queries: list[str]) -> list[str]:
    results = post(http, queries=queries, topk=1).json()["result"]
    return [documents[0]["id"] for documents in results]


def test_shuffled_documents_are_real_unrelated_and_always_the_same(
    serve: Serve, service: Service, contents: list[str]
) -> None:
    queries = [text.partition("\n")[2] for text in contents[:49]]
    answers = []
    for seed in (None, 7, 7, 8):
        app = create_app(
            Service(index=service.index, corpus=service.corpus, fingerprint="f", shuffle_seed=seed)
        )
        with httpx.Client(base_url=serve(app), trust_env=False) as http:
            answers.append(shown(http, queries))
            health = http.get("/health").json()
            assert health["shuffle_seed"] == seed
            assert health["index"] == ("f" if seed is None else f"f-shuffled-{seed}")
            assert post(http, query="tea").headers[INDEX_HEADER] == health["index"]
    plain, seven, again, eight = answers
    assert plain == [f"d{row}" for row in range(49)]
    assert seven == again
    assert seven != eight
    assert all(a != b for a, b in zip(plain, seven, strict=True))
    assert len(set(seven)) == 49


class Slow:
    """An index that waits to be released."""

    def __init__(self, inner: Index) -> None:
        self.inner = inner
        self.size = inner.size
        self.released = threading.Event()
        self.asked: list[str] = []

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        self.asked += queries
        assert self.released.wait(20)
        if "fail" in queries:
            raise ArithmeticError("index broke")
        return self.inner.search(queries, top_k)


def test_a_full_queue_is_503_with_retry_after_and_others_keep_their_answers(
    serve: Serve, service: Service
) -> None:
    slow = Slow(service.index)
    app = create_app(Service(index=slow, corpus=service.corpus, fingerprint="f"), max_queue=3)
    url = serve(app)

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:

            def ask(*queries: str) -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/retrieve", json={"queries": queries}))

            kept = ask("tea")
            await asyncio.sleep(0.1)
            waiting = ask("coffee", "bread", "chess")
            await asyncio.sleep(0.1)
            refused = await ask("gold")
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert "3 queries are waiting" in refused.json()["error"]
            slow.released.set()
            assert (await kept).json()["result"][0][0]["id"] == "d46"
            assert len((await waiting).json()["result"]) == 3

    asyncio.run(scenario())


def test_a_broken_index_is_a_500_with_its_reason(serve: Serve, service: Service) -> None:
    slow = Slow(service.index)
    slow.released.set()
    url = serve(create_app(Service(index=slow, corpus=service.corpus, fingerprint="f")))
    with httpx.Client(base_url=url, trust_env=False) as http:
        broken = post(http, query="fail")
        assert (broken.status_code, broken.json()) == (500, {"error": "ArithmeticError: index broke"})
        assert post(http, query="tea").status_code == 200


def test_a_token_guards_the_documents_and_nothing_else(serve: Serve, service: Service) -> None:
    with httpx.Client(base_url=serve(create_app(service, token="s3cret")), trust_env=False) as http:

        def status(authorization: str | None) -> int:
            headers = {} if authorization is None else {"Authorization": authorization}
            answer = http.post("/retrieve", json={"query": "tea"}, headers=headers)
            if answer.status_code == 401:
                assert answer.headers["www-authenticate"] == "Bearer"
                assert "token" in answer.json()["error"]
                assert "s3cret" not in answer.text
            return answer.status_code

        assert status("Bearer s3cret") == status("bearer s3cret") == 200
        refused = [None, "", "Bearer", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "s3cret"]
        assert {status(value) for value in refused} == {401}
        assert http.post("/retrieve", content=b"x" * 100_000).status_code == 401  # before anything is read
        for path in ("/health", "/metrics"):
            assert http.get(path).status_code == 200
            assert "s3cret" not in http.get(path).text


def test_queries_beyond_their_clients_deadline_are_not_computed(serve: Serve, service: Service) -> None:
    slow = Slow(service.index)
    url = serve(create_app(Service(index=slow, corpus=service.corpus, fingerprint="f")))

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:

            def ask(query: str, timeout_ms: str | None = None) -> asyncio.Task[httpx.Response]:
                headers = {} if timeout_ms is None else {TIMEOUT_HEADER: timeout_ms}
                return asyncio.create_task(client.post("/retrieve", json={"query": query}, headers=headers))

            running = ask("tea")
            await until(lambda: slow.asked == ["tea"])
            late = await ask("coffee", "50")
            assert late.status_code == 504
            assert late.json()["error"].startswith("no answer in time")
            assert late.headers[INDEX_HEADER] == "f"
            early = ask("gold", "20000")
            assert (await ask("x", "soon")).status_code == 400
            slow.released.set()
            assert (await running).status_code == (await early).status_code == 200
            assert slow.asked == ["tea", "gold"]

    asyncio.run(scenario())


def test_queries_of_clients_that_left_are_not_computed(serve: Serve, service: Service) -> None:
    slow = Slow(service.index)
    url = serve(create_app(Service(index=slow, corpus=service.corpus, fingerprint="f")))

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:

            def ask(*queries: str) -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/retrieve", json={"queries": queries}))

            async def queue(length: int) -> None:
                async with asyncio.timeout(5):
                    while (await client.get("/health")).json()["queue"] != length:
                        await asyncio.sleep(0.01)

            running = ask("tea")
            await until(lambda: slow.asked == ["tea"])
            leaving, staying = ask("gold", "iron"), ask("iron")
            await queue(2)
            leaving.cancel()  # httpx closes its connection
            await queue(1)
            slow.released.set()
            assert (await running).status_code == 200
            assert (await staying).json()["result"][0][0]["id"] == "d33"
            assert slow.asked == ["tea", "iron"]
        with httpx.Client(base_url=url, trust_env=False) as http:
            found = samples(http)
        assert found['searchrl_retrieval_queries_total{outcome="abandoned"}'] == 1
        assert found['searchrl_retrieval_requests_total{status="499"}'] == 1

    asyncio.run(scenario())


def test_a_request_larger_than_the_queue_is_413(serve: Serve, service: Service) -> None:
    with httpx.Client(base_url=serve(create_app(service, max_queue=2)), trust_env=False) as http:
        answer = post(http, queries=["tea", "gold", "iron"])
        assert answer.status_code == 413
        assert "the queue holds 2" in answer.json()["error"]


def test_while_the_index_hangs_the_other_endpoints_answer(serve: Serve, service: Service) -> None:
    slow = Slow(service.index)
    url = serve(create_app(Service(index=slow, corpus=service.corpus, fingerprint="f")))

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            hanging = asyncio.create_task(client.post("/retrieve", json={"query": "tea"}))
            await until(lambda: slow.asked == ["tea"])
            await asyncio.sleep(0.05)
            for _ in range(20):
                async with asyncio.timeout(1):
                    health = (await client.get("/health")).json()
                    assert (await client.get("/metrics")).status_code == 200
            assert health["computing_s"] > 0.04
            slow.released.set()
            assert (await hanging).status_code == 200

    asyncio.run(scenario())


def test_a_corpus_that_cannot_be_read_fails_the_request_only(serve: Serve, service: Service) -> None:
    class Lost:
        size = 50

        def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
            return [[Hit(99 if query == "lost" else 0, 1.0)] for query in queries]

    url = serve(create_app(Service(index=Lost(), corpus=service.corpus, fingerprint="f")))
    with httpx.Client(base_url=url, trust_env=False) as http:
        broken = post(http, query="lost")
        assert broken.status_code == 500
        assert "row 99" in broken.json()["error"]
        assert post(http, query="found").status_code == 200


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)
