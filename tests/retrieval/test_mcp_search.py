"""The MCP client against real servers, made with the package's own class, of both protocols."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from example import ROOT
from searchrl.config import WebConfig
from searchrl.retrieval.mcp_search import McpEngine
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.transport import RetryPolicy
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.retrieval.web import WebRetriever
from searchrl.trajectory import Document

TOKEN = "t0ken-that-must-not-be-seen"
TWICE = RetryPolicy(timeout_s=1.5, deadline_s=3.0, first_pause_s=2.0, max_pause_s=4.0)
"""A first retry after 1 to 2 seconds, which a busy machine may add one to; a second never fits."""

Serve = Callable[[ASGIApp], str]

pytestmark = [
    pytest.mark.integration,
    # The mcp package leaves streams of sessions that were cut off to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The server's class sets up logging of its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def search_server() -> ASGIApp:
    from mcp.server.mcpserver import Image, MCPServer

    server = MCPServer("search engine")

    @server.tool()
    async def search(query: str) -> list[str]:
        """Search."""
        await asyncio.sleep(0.02)
        if query == "nothing":
            return []
        if query == "broken":
            raise RuntimeError("the engine is down")
        if query == "slow":
            await asyncio.sleep(4.0)
        return [f'"Title {i}"\nText {i} on {query}.' for i in range(5)]

    @server.tool()
    def records(query: str) -> list[dict[str, str]]:
        """Search."""
        return [
            {"title": f"{query} {i}", "url": f"https://{host}/", "description": f"about {i}"}
            for i, host in enumerate(["a.org", "www.quizlet.com", "b.org"])
        ]

    @server.tool()
    def picture(query: str) -> Any:
        """Search."""
        return Image(data=query.encode(), format="png")

    return server.streamable_http_app()


def of_the_old_protocol(app: ASGIApp) -> ASGIApp:
    """Answer the present protocol's first question as servers do that do not know it."""

    async def old(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        message = await receive()  # one is enough for these small bodies
        if b"server/discover" in message["body"]:
            await Response("what?", 400)(scope, receive, send)
            return
        waiting = [message]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        await app(scope, again, send)

    return old


@pytest.fixture(scope="module")
def endpoint(serve: Serve) -> str:
    return serve(search_server()) + "/mcp"


@pytest.fixture(scope="module")
def old_endpoint(serve: Serve) -> str:
    return serve(of_the_old_protocol(search_server())) + "/mcp"


@pytest.fixture(params=["endpoint", "old_endpoint"])
def url(request: pytest.FixtureRequest) -> str:
    """A server of the present protocol, and one of the protocol before."""
    address = request.getfixturevalue(request.param)
    assert isinstance(address, str)
    return address


def retriever_of(url: str, *, meter: RetrievalMeter | None = None, **web: Any) -> WebRetriever:
    config = WebConfig(url=url, requests_per_second=1000.0, **web)
    return WebRetriever(
        McpEngine(config), config, policy=TWICE, max_concurrency=32, meter=meter or RetrievalMeter()
    )


def run(retriever: WebRetriever, *queries: str) -> list[list[Document] | BaseException]:
    async def scenario() -> list[list[Document] | BaseException]:
        try:
            searches = (retriever.search(query, 3) for query in queries)
            return await asyncio.gather(*searches, return_exceptions=True)
        finally:
            await retriever.aclose()

    return asyncio.run(scenario())


def failure(retriever: WebRetriever, query: str = "q") -> RetrievalError:
    (error,) = run(retriever, query)
    assert isinstance(error, RetrievalError), error
    return error


def answering(status: int, body: str = "no", **headers: str) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            await Response(body, status, headers=sent)(scope, receive, send)

    return app


def test_the_example_of_a_server_is_searched(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = ['"Accra"\nAccra is the capital of Ghana.', '"Lima"\nLima is in Peru.', '"Oslo"\nOslo is cold.']
    corpus.write_text("".join(json.dumps({"id": str(i), "contents": t}) + "\n" for i, t in enumerate(texts)))
    monkeypatch.syspath_prepend(ROOT)
    server = importlib.import_module("examples.mcp_server").make_server(corpus, count=2)
    endpoint = serve(server.streamable_http_app()) + "/mcp"

    ghana, two, none = run(retriever_of(endpoint, tool="lookup"), "The capital of GHANA", "is", "nowhere")
    assert isinstance(ghana, list)
    assert isinstance(two, list)
    assert (ghana[0].title, ghana[0].text) == ("Accra", "Accra is the capital of Ghana.")
    assert (len(two), none) == (2, [])


def test_text_blocks_become_documents(url: str) -> None:
    meter = RetrievalMeter()
    retriever = retriever_of(url, meter=meter)
    queries = [f"q{i}" for i in range(8)]
    for query, documents in zip(queries, run(retriever, *queries), strict=True):
        assert isinstance(documents, list), documents
        assert [d.contents for d in documents] == [f'"Title {i}"\nText {i} on {query}.' for i in range(3)]
        assert [d.score for d in documents] == [1, 1 / 2, 1 / 3]
        assert len({d.id for d in documents}) == 3
    assert +meter.counts == {"requests": 8}


def test_nothing_found_is_empty_and_a_tool_that_failed_is_an_error(url: str) -> None:
    meter = RetrievalMeter()
    nothing, broken, fine = run(retriever_of(url, meter=meter), "nothing", "broken", "fine")
    assert nothing == []
    assert isinstance(broken, RetrievalError)
    assert broken.kind is FailureKind.UNAVAILABLE
    assert "tool 'search' failed" in str(broken)
    assert isinstance(fine, list)
    assert meter.counts["retries"] == 1


def test_structured_results_keep_their_links_and_the_blocked_ones_go(endpoint: str) -> None:
    meter = RetrievalMeter()
    (documents,) = run(retriever_of(endpoint, tool="records", meter=meter), "q")
    assert documents == [
        Document(id="https://a.org/", contents='"q 0"\nabout 0', score=1.0),
        Document(id="https://b.org/", contents='"q 2"\nabout 2', score=0.5),
    ]
    assert meter.counts["results_blocked"] == 1


def test_what_is_no_text_is_out_of_form(endpoint: str) -> None:
    error = failure(retriever_of(endpoint, tool="picture"))
    assert (error.kind, "image" in str(error)) == (FailureKind.BAD_RESPONSE, True)
    assert "Unknown tool" in str(failure(retriever_of(endpoint, tool="missing")))


def test_a_slow_tool_and_a_server_that_hangs_are_timeouts(url: str, serve: Serve) -> None:
    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await asyncio.sleep(4.0)

    for retriever in (retriever_of(url), retriever_of(serve(hang))):
        loop_time = asyncio.new_event_loop()
        start = loop_time.time()
        assert failure(retriever, "slow").kind is FailureKind.TIMEOUT
        assert loop_time.time() - start < TWICE.deadline_s + 5.0
        loop_time.close()


@pytest.mark.parametrize(
    ("app", "kind", "requests"),
    [
        (answering(401), FailureKind.UNAUTHORIZED, 1),
        (answering(403), FailureKind.UNAUTHORIZED, 1),
        (answering(402), FailureKind.BAD_RESPONSE, 1),
        (answering(404), FailureKind.BAD_RESPONSE, 1),
        (answering(429), FailureKind.OVERLOADED, 2),
        (answering(500), FailureKind.UNAVAILABLE, 2),
        (answering(200, "<html>hello</html>", content_type="text/html"), FailureKind.BAD_RESPONSE, 1),
        (answering(200, "{}", content_type="application/json"), FailureKind.BAD_RESPONSE, 1),
        (answering(301, "", location="https://example.org/mcp"), FailureKind.BAD_RESPONSE, 1),
    ],
    ids=["401", "403", "402", "404", "429", "500", "html", "json", "301"],
)
def test_a_server_that_is_none_is_a_typed_error_without_the_token(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    app: ASGIApp,
    kind: FailureKind,
    requests: int,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MCP_TOKEN", TOKEN)
    meter = RetrievalMeter()
    retriever = retriever_of(serve(app) + "/mcp", meter=meter)
    error = failure(retriever)
    assert (error.kind, meter.counts["requests"]) == (kind, requests), error
    assert TOKEN not in f"{error} {error!r} {error.__cause__!r} {vars(retriever)} {caplog.text}"


def test_the_token_is_sent_as_bearer_and_only_if_set(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            seen.append(dict(scope["headers"]).get(b"authorization"))
            await Response(status_code=403)(scope, receive, send)

    address = serve(app)
    monkeypatch.setenv("MCP_TOKEN", TOKEN)
    failure(retriever_of(address))
    monkeypatch.delenv("MCP_TOKEN")
    failure(retriever_of(address))
    assert seen == [f"Bearer {TOKEN}".encode(), None]


def test_nobody_listening_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert failure(retriever_of(f"http://127.0.0.1:{port}/mcp")).kind is FailureKind.UNAVAILABLE


def test_a_search_that_is_cancelled_or_closed_leaves_the_others_alone(url: str) -> None:
    async def scenario() -> list[list[Document] | BaseException]:
        retriever = retriever_of(url)
        searches = [asyncio.create_task(retriever.search(query, 1)) for query in ("slow", "q", "slow")]
        await asyncio.sleep(0.3)
        searches[0].cancel()
        await asyncio.wait(searches[1:2])
        await retriever.aclose()
        return await asyncio.gather(*searches, return_exceptions=True)

    cancelled, fine, closed = asyncio.run(scenario())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert isinstance(fine, list)
    assert isinstance(closed, RetrievalError)
    assert closed.kind is FailureKind.UNAVAILABLE
