from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from searchrl.retrieval.app import Service, create_app
from searchrl.retrieval.client import HttpRetriever
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.loading import load_index
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.none import NoRetriever
from searchrl.retrieval.transport import MAX_ANSWER_BYTES
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

    meter = RetrievalMeter()
    retriever = HttpRetriever([serve(app_of(handler))], max_concurrency=300, meter=meter)
    queries = [f"q{i}" for i in range(300)]
    results = run(retriever, *queries, top_k=2)
    expected = [[Document(id=f"{q}{i}", contents=q, score=1.0) for i in range(2)] for q in queries]
    assert results == expected
    assert sorted(sizes) == [44, 64, 64, 64, 64]
    assert meter.counts == {"requests": 5, "retries": 0}


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


WRONG_ANSWERS = [
    (b"<html>garbage</html>", 200, FailureKind.BAD_RESPONSE),
    (b'{"result": []}', 200, FailureKind.BAD_RESPONSE),
    (b'{"result": [["text"]]}', 200, FailureKind.BAD_RESPONSE),
    (b"no such page", 404, FailureKind.BAD_RESPONSE),
    (b"moved", 302, FailureKind.BAD_RESPONSE),
    (b"log in", 401, FailureKind.UNAUTHORIZED),
    (b"not you", 403, FailureKind.UNAUTHORIZED),
    (b'{"error": "no"}', 422, FailureKind.REJECTED),
    (b"too late", 504, FailureKind.TIMEOUT),
    (b"broken", 500, FailureKind.UNAVAILABLE),
    (b"busy", 503, FailureKind.OVERLOADED),
    (b"slow down", 429, FailureKind.OVERLOADED),
]


@pytest.fixture(scope="module")
def wrong_answers(serve: Serve) -> str:
    """Base URL of a server that answers ``/<i>/retrieve`` with the i-th wrong answer."""

    async def handler(request: Request) -> Response:
        content, status, _ = WRONG_ANSWERS[request.path_params["case"]]
        return Response(content, status_code=status)

    return serve(Starlette(routes=[Route("/{case:int}/retrieve", handler, methods=["POST"])]))


@pytest.mark.parametrize("case", range(len(WRONG_ANSWERS)))
def test_a_wrong_answer_is_a_typed_error(wrong_answers: str, case: int) -> None:
    kind = WRONG_ANSWERS[case][2]
    meter = RetrievalMeter()
    error = failure(HttpRetriever([f"{wrong_answers}/{case}"], deadline_s=0.3, meter=meter))
    assert error.kind is kind
    retried = kind in (FailureKind.UNAVAILABLE, FailureKind.OVERLOADED, FailureKind.TIMEOUT)
    assert (meter.counts["retries"] > 0) == retried
    assert meter.counts["requests"] == 1 + meter.counts["retries"]


def test_a_server_that_hangs_is_a_timeout(serve: Serve) -> None:
    async def handler(request: Request) -> Response:
        await asyncio.sleep(0.5)
        return JSONResponse({"result": [[]]})

    error = failure(HttpRetriever([serve(app_of(handler))], timeout_s=0.1, deadline_s=0.3))
    assert error.kind is FailureKind.TIMEOUT
    assert "did not answer in 0.1 s" in str(error)


def test_a_server_that_dribbles_is_a_timeout() -> None:
    """Each byte comes in time, the answer never ends."""
    dribbling = 0

    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dribbling
        dribbling += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" ")
            await asyncio.sleep(0.02)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        dribbling -= 1

    async def scenario() -> RetrievalError:
        server = await asyncio.start_server(dribble, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        retriever = HttpRetriever([url], timeout_s=0.3, deadline_s=0.4)
        with pytest.raises(RetrievalError) as caught:
            await retriever.search("q", 1)
        await retriever.aclose()
        async with asyncio.timeout(5):
            while dribbling:
                await asyncio.sleep(0.01)
        server.close()
        await server.wait_closed()
        return caught.value

    assert asyncio.run(scenario()).kind is FailureKind.TIMEOUT


def test_nobody_listening_is_unavailable_within_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    error = failure(HttpRetriever([f"http://127.0.0.1:{port}"], deadline_s=0.5))
    assert error.kind is FailureKind.UNAVAILABLE


def test_a_passing_trouble_is_retried(serve: Serve) -> None:
    answers = iter([(500, {}), (503, {"Retry-After": "0"})])

    async def handler(request: Request) -> Response:
        status, headers = next(answers, (200, {}))
        body = await request.json()
        return echo(body["queries"], 1) if status == 200 else Response(status_code=status, headers=headers)

    meter = RetrievalMeter()
    retriever = HttpRetriever([serve(app_of(handler))], meter=meter)
    assert run(retriever, "q") == [[Document(id="q0", contents="q", score=1.0)]]
    assert meter.counts == {"requests": 3, "retries": 2}


def test_a_dead_server_is_passed_over_for_a_living_one(serve: Serve) -> None:
    async def handler(request: Request) -> Response:
        return echo((await request.json())["queries"], 1)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert run(HttpRetriever([dead, serve(app_of(handler))]), "q") == [
        [Document(id="q0", contents="q", score=1.0)]
    ]


def test_a_refused_query_does_not_take_the_others_along(serve: Serve) -> None:
    seen: list[str] = []

    async def handler(request: Request) -> Response:
        queries = (await request.json())["queries"]
        seen.extend(queries)
        return JSONResponse({"error": "X"}, 422) if "X" in queries else echo(queries, 1)

    results = run(
        HttpRetriever([serve(app_of(handler))]), *"abc", "X", "\0", "\ud800", " ", "y" * 3000, *"def"
    )
    errors = {i: r.kind for i, r in enumerate(results) if isinstance(r, RetrievalError)}
    assert errors == dict.fromkeys([3, 4, 5, 6, 7], FailureKind.REJECTED)
    good = [r[0].contents for r in results if isinstance(r, list)]
    assert good == list("abcdef")
    assert set(seen) == set("abcdefX")  # what no server would take was not sent


def test_closing_fails_what_waits(serve: Serve) -> None:
    async def handler(request: Request) -> Response:
        await asyncio.sleep(0.3)
        return echo((await request.json())["queries"], 1)

    async def scenario(turns: int, pause_s: float) -> list[list[Document] | BaseException]:
        retriever = HttpRetriever([url], max_concurrency=8)
        searches = [asyncio.create_task(retriever.search(f"q{i}", i % 6 + 1)) for i in range(12)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await asyncio.sleep(pause_s)
        await retriever.aclose()
        return await asyncio.gather(*searches, return_exceptions=True)

    url = serve(app_of(handler))
    # In each stage: not yet queued, queued, senders made but not begun, under way.
    for turns, pause_s in [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0), (0, 0.1)]:
        results = asyncio.run(scenario(turns, pause_s))
        assert [r.kind for r in results if isinstance(r, RetrievalError)] == [FailureKind.UNAVAILABLE] * 12


def test_bad_urls_are_refused_at_once() -> None:
    for urls, reason in [([], "at least one URL"), (["127.0.0.1:80"], "no http"), (["ftp://x"], "no http")]:
        with pytest.raises((ValueError, httpx.InvalidURL), match=reason):
            HttpRetriever(urls)


@pytest.mark.parametrize("token", ["a b", "secret\nX-Evil: 1", "sécret"])
def test_a_token_that_is_no_header_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(ValueError, match="must be printable ASCII") as caught:
        HttpRetriever(["http://127.0.0.1:1"], token=token)
    assert token not in str(caught.value)


def test_token_and_time_left_are_sent_and_the_token_is_not_shown(serve: Serve) -> None:
    seen: list[tuple[str, int]] = []

    async def handler(request: Request) -> Response:
        token = request.headers.get("authorization", "")
        seen.append((token, int(request.headers["x-searchrl-timeout-ms"])))
        if token != "Bearer right":
            return JSONResponse({"error": f"bad header {token}"}, 401)
        return echo((await request.json())["queries"], 1)

    url = serve(app_of(handler))
    assert isinstance(run(HttpRetriever([url], token="right", timeout_s=9.0), "q")[0], list)
    assert isinstance(run(HttpRetriever([url], token="right", deadline_s=2.0), "q")[0], list)
    assert [token for token, _ in seen] == ["Bearer right"] * 2
    assert seen[0][1] == 9000
    assert 1000 < seen[1][1] <= 2000  # a request has no more time than its search
    meter = RetrievalMeter()
    error = failure(HttpRetriever([url], token="wr0ng-t0ken", meter=meter))
    assert error.kind is FailureKind.UNAUTHORIZED
    assert "set SEARCHRL_RETRIEVAL_TOKEN" in str(error)
    assert "wr0ng-t0ken" not in str(error) + repr(error.__cause__)
    assert meter.counts["requests"] == 1


def test_an_answer_without_bounds_is_cut_off(serve: Serve) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(2 * MAX_ANSWER_BYTES // 65536):
            yield b" " * 65536
            await asyncio.sleep(0)

    async def handler(request: Request) -> Response:
        return StreamingResponse(chunks())

    error = failure(HttpRetriever([serve(app_of(handler))]))
    assert error.kind is FailureKind.BAD_RESPONSE
    assert f"more than {MAX_ANSWER_BYTES} bytes" in str(error)


def test_waiting_for_a_place_counts_against_the_deadline(serve: Serve) -> None:
    async def handler(request: Request) -> Response:
        await asyncio.sleep(0.3)
        return echo((await request.json())["queries"], 1)

    results = run(HttpRetriever([serve(app_of(handler))], max_concurrency=2, deadline_s=0.5), *"abcd")
    assert [isinstance(r, list) for r in results] == [True, True, False, False]
    late = results[3]
    assert isinstance(late, RetrievalError)
    assert late.kind is FailureKind.TIMEOUT


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
