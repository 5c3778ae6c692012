from __future__ import annotations

import asyncio
import gc
import json
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from searchrl.retrieval.app import Service, create_app
from searchrl.retrieval.build import load_index
from searchrl.retrieval.client import HttpRetriever
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.none import NoRetriever
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.trajectory import Document

Serve = Callable[[ASGIApp], str]
Handler = Callable[[Request], Awaitable[Response]]


def app_of(handler: Handler) -> Starlette:
    return Starlette(routes=[Route("/retrieve", handler, methods=["POST"])])


def echo(queries: list[str], top_k: int) -> Response:
    """Answer each query with documents that name it."""
    items = [
        [{"document": {"id": f"{q}{i}", "contents": q}, "score": 1.0} for i in range(top_k)] for q in queries
    ]
    return JSONResponse({"result": items})


def run(retriever: HttpRetriever, *queries: str, top_k: int = 1) -> list[list[Document] | BaseException]:
    async def scenario() -> list[list[Document] | BaseException]:
        searches = (retriever.search(query, top_k) for query in queries)
        try:
            return await asyncio.gather(*searches, return_exceptions=True)
        finally:
            await retriever.aclose()

    return asyncio.run(scenario())


def failure(retriever: HttpRetriever, query: str = "q") -> RetrievalError:
    (error,) = run(retriever, query)
    assert isinstance(error, RetrievalError)
    return error


def test_searches_travel_together_and_each_gets_its_own(serve: Serve) -> None:
    sizes: list[int] = []

    async def handler(request: Request) -> Response:
        body = await request.json()
        sizes.append(len(body["queries"]))
        return echo(body["queries"], body["topk"])

    retriever = HttpRetriever([serve(app_of(handler))])
    queries = [f"q{i}" for i in range(300)]
    results = run(retriever, *queries, top_k=2)
    expected = [[Document(id=f"{q}{i}", contents=q, score=1.0) for i in range(2)] for q in queries]
    assert results == expected
    assert sorted(sizes) == [44, 64, 64, 64, 64]
    stats = retriever.stats()
    assert (stats.queries, stats.failed, stats.requests, stats.retries) == (300, 0, 5, 0)
    assert 0 < stats.p50_s <= stats.p99_s
    assert retriever.stats().queries == 0


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_searches_of_different_depth_and_several_loops(serve: Serve) -> None:
    async def handler(request: Request) -> Response:
        body = await request.json()
        return echo(body["queries"], body["topk"])

    retriever = HttpRetriever([serve(app_of(handler)) + "/retrieve"])

    async def scenario() -> list[int]:
        found = await asyncio.gather(*(retriever.search("q", k) for k in (1, 3, 1, 2)))
        return [len(documents) for documents in found]

    assert asyncio.run(scenario()) == [1, 3, 1, 2]
    assert asyncio.run(scenario()) == [1, 3, 1, 2]  # the first loop is gone, with its connections
    assert len(run(retriever, "q")) == 1
    gc.collect()  # the sockets of abandoned loops warn here, not in another test


def test_it_understands_our_server_and_plain_nesting(
    serve: Serve, bm25_directory: Path, corpus_path: Path
) -> None:
    corpus = Corpus(corpus_path)
    app = create_app(Service(index=load_index(bm25_directory, corpus), corpus=corpus, fingerprint="f"))
    tea, nothing = run(HttpRetriever([serve(app)]), "tea", "xyzzy", top_k=3)
    assert isinstance(tea, list)
    assert (tea[0].id, tea[0].title) == ("d46", "Tea")
    assert tea[0].score > 0
    assert nothing == []

    async def plain(request: Request) -> Response:
        return JSONResponse({"result": [[{"id": "1", "contents": "x"}]]})

    assert run(HttpRetriever([serve(app_of(plain))]), "q") == [[Document(id="1", contents="x", score=0.0)]]


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        (b"<html>garbage</html>", 200, FailureKind.BAD_RESPONSE),
        (b'{"result": []}', 200, FailureKind.BAD_RESPONSE),
        (b'{"result": [["text"]]}', 200, FailureKind.BAD_RESPONSE),
        (b"no such page", 404, FailureKind.BAD_RESPONSE),
        (b"log in", 401, FailureKind.BAD_RESPONSE),
        (b'{"error": "no"}', 422, FailureKind.REJECTED),
        (b"broken", 500, FailureKind.UNAVAILABLE),
        (b"busy", 503, FailureKind.OVERLOADED),
        (b"slow down", 429, FailureKind.OVERLOADED),
    ],
)
def test_a_wrong_answer_is_a_typed_error(
    serve: Serve, content: bytes, status: int, kind: FailureKind
) -> None:
    async def handler(request: Request) -> Response:
        return Response(content, status_code=status)

    retriever = HttpRetriever([serve(app_of(handler))], max_retries=1)
    error = failure(retriever)
    assert error.kind is kind
    stats = retriever.stats()
    retried = kind in (FailureKind.UNAVAILABLE, FailureKind.OVERLOADED)
    assert (stats.failed, stats.requests, stats.retries) == (1, 1 + retried, int(retried))


def test_a_server_that_hangs_is_a_timeout(serve: Serve) -> None:
    async def handler(request: Request) -> Response:
        await asyncio.sleep(0.5)
        return JSONResponse({"result": [[]]})

    error = failure(HttpRetriever([serve(app_of(handler))], timeout_s=0.1, max_retries=1))
    assert error.kind is FailureKind.TIMEOUT
    assert "did not answer in 0.1 s (attempt 2, the last)" in str(error)


def test_a_server_that_dribbles_is_a_timeout() -> None:
    """Each byte comes in time, the answer never ends."""
    finished = asyncio.Event()

    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" ")
            await asyncio.sleep(0.02)
        writer.close()
        finished.set()

    async def scenario() -> RetrievalError:
        server = await asyncio.start_server(dribble, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        retriever = HttpRetriever([url], timeout_s=0.3, max_retries=0)
        with pytest.raises(RetrievalError) as caught:
            await retriever.search("q", 1)
        await retriever.aclose()
        await asyncio.wait_for(finished.wait(), 5)
        server.close()
        await server.wait_closed()
        return caught.value

    assert asyncio.run(scenario()).kind is FailureKind.TIMEOUT


def test_nobody_listening_is_unavailable_within_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    error = failure(HttpRetriever([f"http://127.0.0.1:{port}"], max_retries=100, deadline_s=0.5))
    assert error.kind is FailureKind.UNAVAILABLE


def test_a_passing_trouble_is_retried(serve: Serve) -> None:
    answers = iter([(500, {}), (503, {"Retry-After": "0"})])

    async def handler(request: Request) -> Response:
        status, headers = next(answers, (200, {}))
        body = await request.json()
        return echo(body["queries"], 1) if status == 200 else Response(status_code=status, headers=headers)

    retriever = HttpRetriever([serve(app_of(handler))])
    assert run(retriever, "q") == [[Document(id="q0", contents="q", score=1.0)]]
    assert retriever.stats().retries == 2


def test_a_dead_server_is_passed_over_for_a_living_one(serve: Serve) -> None:
    async def handler(request: Request) -> Response:
        return echo((await request.json())["queries"], 1)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert run(HttpRetriever([dead, serve(app_of(handler))]), "q") == [
        [Document(id="q0", contents="q", score=1.0)]
    ]


def test_a_refused_query_does_not_take_the_others_along(serve: Serve) -> None:
    async def handler(request: Request) -> Response:
        queries = (await request.json())["queries"]
        return JSONResponse({"error": "NUL"}, 422) if any("\0" in q for q in queries) else echo(queries, 1)

    results = run(HttpRetriever([serve(app_of(handler))]), *"abc", "\0", "\ud800", *"def")
    errors = {i: r.kind for i, r in enumerate(results) if isinstance(r, RetrievalError)}
    assert errors == {3: FailureKind.REJECTED, 4: FailureKind.REJECTED}
    good = [r[0].contents for r in results if isinstance(r, list)]
    assert good == list("abcdef")


def test_closing_fails_what_waits(serve: Serve) -> None:
    async def handler(request: Request) -> Response:
        await asyncio.sleep(0.3)
        return echo((await request.json())["queries"], 1)

    async def scenario() -> list[list[Document] | BaseException]:
        retriever = HttpRetriever([url])
        searches = [asyncio.create_task(retriever.search(f"q{i}", i % 6 + 1)) for i in range(12)]
        await asyncio.sleep(0.1)
        await retriever.aclose()
        return await asyncio.gather(*searches, return_exceptions=True)

    url = serve(app_of(handler))
    results = asyncio.run(scenario())
    assert [r.kind for r in results if isinstance(r, RetrievalError)] == [FailureKind.UNAVAILABLE] * 12


def test_bad_urls_are_refused_at_once() -> None:
    for urls, reason in [([], "at least one URL"), (["127.0.0.1:80"], "no http"), (["ftp://x"], "no http")]:
        with pytest.raises((ValueError, httpx.InvalidURL), match=reason):
            HttpRetriever(urls)


def test_no_retriever_finds_nothing() -> None:
    async def scenario() -> list[Document]:
        retriever = NoRetriever()
        await retriever.aclose()
        return await retriever.search("q", 3)

    assert asyncio.run(scenario()) == []


def test_importing_the_client_is_light() -> None:
    heavy = ["torch", "transformers", "faiss", "bm25s", "numpy", "numba"]
    program = (
        "import sys, json, searchrl.retrieval.client\n"
        f"print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    output = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    assert json.loads(output.stdout) == []
