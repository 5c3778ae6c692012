"""The web clients against stand-ins of the services that they ask, on loopback."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from searchrl.config import ConfigError, RetrievalKind, WebConfig
from searchrl.retrieval.brave import BraveEngine
from searchrl.retrieval.google import GoogleEngine
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.pages import PageReader
from searchrl.retrieval.searxng import SearxngEngine
from searchrl.retrieval.transport import RetryPolicy
from searchrl.retrieval.types import FailureKind, RetrievalError, SearchStatus
from searchrl.retrieval.web import RateLimit, WebRetriever, open_web_retriever, source_identity
from searchrl.retrieval.web_engine import Engine, WebResult, results_in
from searchrl.trajectory import Document

KEY = "k3y-that-must-not-be-seen"
KINDS = ("google", "brave", "searxng")
TWICE = RetryPolicy(timeout_s=0.4, deadline_s=1.2, first_pause_s=0.8, max_pause_s=2.0)
"""Time for two attempts, then none for a third."""
QUICK = RetryPolicy(timeout_s=0.4, deadline_s=1.5, first_pause_s=0.02, max_pause_s=0.05)

Serve = Callable[[ASGIApp], str]
Handler = Callable[[Request], Awaitable[Response]]


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    monkeypatch.setenv("BRAVE_API_KEY", KEY)


@pytest.fixture(scope="module")
def serve(serve: Serve) -> Serve:
    """One server for all tests, which answers as the last of them said."""
    current: list[ASGIApp] = []

    async def switch(scope: Scope, receive: Receive, send: Send) -> None:
        await current[-1](scope, receive, send)

    url = serve(switch)

    def switch_to(app: ASGIApp) -> str:
        current.append(app)
        return url

    return switch_to


def app_of(handler: Handler) -> Starlette:
    return Starlette(routes=[Route("/search", handler, methods=["GET", "POST"])])


def always(answer: Any, status: int = 200, **headers: str) -> Handler:
    """Answer every request so; a string as it is, anything else as JSON."""
    body = answer if isinstance(answer, str) else json.dumps(answer)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}

    async def handler(_: Request) -> Response:
        return Response(body, status, media_type="application/json", headers=sent)

    return handler


def answer_of(kind: str, *results: tuple[str, str, str], **extra: Any) -> dict[str, Any]:
    """What the service of ``kind`` says to have found: links, titles and snippets."""
    if kind == "google":
        items = [
            {"title": title, "link": link, "snippet": text, "position": i + 1}
            for i, (link, title, text) in enumerate(results)
        ]
        return {
            "searchParameters": {"q": "q", "type": "search", "engine": "google"},
            "organic": items,
            "credits": 1,
        }
    if kind == "brave":
        items = [{"url": link, "title": title, "description": text} for link, title, text in results]
        answer: dict[str, Any] = {"type": "search", "query": {"original": "q"}}
        return answer | ({"web": {"type": "search", "results": items}} if items else {})
    items = [
        {"url": link, "title": title, "content": text, "engine": "x", "score": 1.0}
        for link, title, text in results
    ]
    return {"query": "q", "results": items, "answers": [], "unresponsive_engines": []} | extra


def engine_of(kind: str, url: str, **web: Any) -> Engine:
    if kind == "google":
        return GoogleEngine(WebConfig(**web), url=f"{url}/search")
    if kind == "brave":
        return BraveEngine(WebConfig(**web), url=f"{url}/search")
    return SearxngEngine(WebConfig(url=url, **web))


def retriever_of(
    kind: str,
    url: str,
    *,
    policy: RetryPolicy = TWICE,
    meter: RetrievalMeter | None = None,
    pages: PageReader | None = None,
    **web: Any,
) -> WebRetriever:
    return WebRetriever(
        engine_of(kind, url, **web),
        WebConfig(**({"requests_per_second": 1000.0} | web)),
        policy=policy,
        max_concurrency=32,
        meter=meter or RetrievalMeter(),
        pages=pages,
    )


def run(retriever: WebRetriever, *queries: str, top_k: int = 3) -> list[list[Document] | BaseException]:
    async def scenario() -> list[list[Document] | BaseException]:
        try:
            searches = (retriever.search(query, top_k) for query in queries)
            return await asyncio.gather(*searches, return_exceptions=True)
        finally:
            await retriever.aclose()

    return asyncio.run(scenario())


def found(retriever: WebRetriever, query: str = "q", top_k: int = 3) -> list[Document]:
    (result,) = run(retriever, query, top_k=top_k)
    assert isinstance(result, list), result
    return result


def failure(retriever: WebRetriever, query: str = "q") -> RetrievalError:
    (error,) = run(retriever, query)
    assert isinstance(error, RetrievalError), error
    return error


RESULTS = [(f"https://site{i}.org/page", f"Title {i}", f"Text number {i}.") for i in range(10)]


@pytest.mark.parametrize("kind", KINDS)
def test_results_become_documents_in_the_form_of_the_corpus(serve: Serve, kind: str) -> None:
    meter = RetrievalMeter()
    documents = found(retriever_of(kind, serve(app_of(always(answer_of(kind, *RESULTS)))), meter=meter))
    assert documents == [
        Document(id=f"https://site{i}.org/page", contents=f'"Title {i}"\nText number {i}.', score=1 / (i + 1))
        for i in range(3)
    ]
    assert [documents[0].title, documents[0].text] == ["Title 0", "Text number 0."]
    assert +meter.counts == {"requests": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent(serve: Serve, kind: str) -> None:
    seen: list[tuple[str, Any, httpx.Headers]] = []

    async def handler(request: Request) -> Response:
        sent = dict(request.query_params) if request.method == "GET" else await request.json()
        seen.append((request.method, sent, httpx.Headers(request.headers.raw)))
        return JSONResponse(answer_of(kind))

    url = serve(app_of(handler))
    assert found(retriever_of(kind, url, country="de", language="fr"), "Wer ist „Ä“?", top_k=9) == []
    ((method, sent, headers),) = seen
    expected: dict[str, tuple[str, dict[str, Any]]] = {
        "google": ("POST", {"q": "Wer ist „Ä“?", "num": 14, "gl": "de", "hl": "fr"}),
        "brave": (
            "GET",
            {
                "q": "Wer ist „Ä“?",
                "count": "14",
                "country": "DE",
                "search_lang": "fr",
                "result_filter": "web",
                "text_decorations": "false",
            },
        ),
        "searxng": ("GET", {"q": "Wer ist „Ä“?", "format": "json", "language": "fr"}),
    }
    assert (method, sent) == expected[kind]
    assert headers.get("x-api-key") == (KEY if kind == "google" else None)
    assert headers.get("x-subscription-token") == (KEY if kind == "brave" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_found_is_empty_and_no_error(serve: Serve, kind: str) -> None:
    assert found(retriever_of(kind, serve(app_of(always(answer_of(kind)))))) == []


def test_serper_may_leave_out_the_organic_results(serve: Serve) -> None:
    answer = {"searchParameters": {"q": "q"}, "relatedSearches": [], "credits": 1}
    assert found(retriever_of("google", serve(app_of(always(answer))))) == []


OUT_OF_FORM: list[Any] = [
    "<html>hello</html>",
    "",
    "[" * 100_000,
    "[]",
    "{}",
    {"message": "something else"},
    {"organic": {}, "results": {}, "type": "search", "web": {"results": {}}},
    {"organic": None, "results": None, "type": "search", "web": [1]},
    {"organic": ["x"], "results": ["x"], "type": "search", "web": {"results": ["x"]}},
    {"organic": [{}], "results": [{}], "type": "search", "web": {"results": [{}]}},
    {
        "organic": [{"link": "a", "title": 1}],
        "results": [{"url": "a", "title": 1}],
        "type": "search",
        "web": {"results": [{"url": "a", "title": 1}]},
    },
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_out_of_form_is_an_error_and_not_empty(serve: Serve, kind: str) -> None:
    async def handler(request: Request) -> Response:
        sent = request.query_params if request.method == "GET" else await request.json()
        return await always(OUT_OF_FORM[int(sent["q"])])(request)

    meter = RetrievalMeter()
    queries = [str(i) for i in range(len(OUT_OF_FORM))]
    errors = run(retriever_of(kind, serve(app_of(handler)), meter=meter), *queries)
    for error in errors:
        assert isinstance(error, RetrievalError)
        assert error.kind is FailureKind.BAD_RESPONSE
    assert meter.counts["requests"] == len(OUT_OF_FORM)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("status", "body", "failure_kind", "retried"),
    [
        (401, f"bad key {KEY}", FailureKind.UNAUTHORIZED, False),
        (403, f'{{"message": "Unauthorized.", "key": "{KEY}"}}', FailureKind.UNAUTHORIZED, False),
        (402, "pay", FailureKind.UNAUTHORIZED, False),
        (422, "too long", FailureKind.REJECTED, False),
        (301, "", FailureKind.BAD_RESPONSE, False),
        (404, f"{KEY}", FailureKind.BAD_RESPONSE, False),
        (500, f"broken {KEY}", FailureKind.UNAVAILABLE, True),
        (429, "slow down", FailureKind.OVERLOADED, True),
        (504, "late", FailureKind.TIMEOUT, True),
    ],
)
def test_each_status_is_a_typed_error(
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    status: int,
    body: str,
    failure_kind: FailureKind,
    retried: bool,
) -> None:
    caplog.set_level(logging.DEBUG)
    meter = RetrievalMeter()
    handler = always(body, status, location="http://127.0.0.1:9/")
    retriever = retriever_of(kind, serve(app_of(handler)), meter=meter)
    error = failure(retriever)
    assert error.kind is failure_kind
    assert meter.counts["requests"] == (2 if retried else 1)
    if kind != "searxng":  # which has no key
        cause = error.__cause__ or error
        assert KEY not in f"{error} {error!r} {cause} {cause!r} {retriever!r} {vars(retriever)}"
        assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("kind", "status", "body"),
    [
        ("google", 400, {"message": "Not enough credits", "statusCode": 400}),
        (
            "brave",
            422,
            {
                "type": "ErrorResponse",
                "error": {"id": "x", "status": 422, "code": "SUBSCRIPTION_TOKEN_INVALID"},
            },
        ),
    ],
)
def test_a_refusal_of_the_key_is_not_taken_for_one_of_the_query(
    serve: Serve, kind: str, status: int, body: Any
) -> None:
    assert failure(retriever_of(kind, serve(app_of(always(body, status))))).kind is FailureKind.UNAUTHORIZED


@pytest.mark.parametrize("kind", KINDS)
def test_a_passing_trouble_is_retried_and_retry_after_honoured(serve: Serve, kind: str) -> None:
    answers = iter([(500, {}), (429, {"Retry-After": "0.3"})])

    async def handler(_: Request) -> Response:
        status, headers = next(answers, (200, {}))
        return JSONResponse(answer_of(kind, *RESULTS), status, headers=headers)

    meter = RetrievalMeter()
    start = time.monotonic()
    url = serve(app_of(handler))
    assert len(found(retriever_of(kind, url, policy=QUICK, meter=meter))) == 3
    assert time.monotonic() - start > 0.3
    assert +meter.counts == {"requests": 3, "retries": 2}


def test_a_hung_or_dead_engine_is_an_error_within_the_deadline(serve: Serve) -> None:
    async def handler(_: Request) -> Response:
        await asyncio.sleep(0.8)
        return JSONResponse(answer_of("google"))

    start = time.monotonic()
    error = failure(retriever_of("google", serve(app_of(handler))))
    assert (error.kind, error.status) == (FailureKind.TIMEOUT, SearchStatus.TIMEOUT)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert failure(retriever_of("google", f"http://127.0.0.1:{port}")).kind is FailureKind.UNAVAILABLE
    assert time.monotonic() - start < 2 * TWICE.deadline_s + 5.0


def test_searxng_without_results_from_engines_that_did_not_answer_is_a_failure(serve: Serve) -> None:
    silent = answer_of("searxng", unresponsive_engines=[["brave", "HTTP error"], ["bing", "timeout"]])
    error = failure(retriever_of("searxng", serve(app_of(always(silent)))))
    assert error.kind is FailureKind.UNAVAILABLE
    assert "['brave', 'HTTP error']" in str(error)
    some = answer_of("searxng", *RESULTS, unresponsive_engines=[["bing", "timeout"]])
    assert len(found(retriever_of("searxng", serve(app_of(always(some)))))) == 3


def test_searxng_says_what_to_do_when_json_is_not_allowed(serve: Serve) -> None:
    error = failure(retriever_of("searxng", serve(app_of(always("Forbidden", 403)))))
    assert (error.kind, "search.formats" in str(error)) == (FailureKind.UNAUTHORIZED, True)


@pytest.mark.parametrize("kind", KINDS)
def test_titles_and_snippets_are_cleaned(serve: Serve, kind: str) -> None:
    odd = ("https://x.org/", "A\nb\0\ud800 \t“c”", "1\r\n2\u0085\udfff 3\x1b[0m")
    bare = ("https://y.org/", "", "")
    documents = found(retriever_of(kind, serve(app_of(always(answer_of(kind, odd, bare))))))
    assert [document.contents for document in documents] == [
        '"A b “c”"\n1 2 3 [0m',
        '"https://y.org/"\n',
    ]


def test_brave_descriptions_are_unpacked_and_long_queries_cut(serve: Serve) -> None:
    seen: list[str] = []

    async def handler(request: Request) -> Response:
        seen.append(request.query_params["q"])
        return JSONResponse(
            answer_of("brave", ("https://x.org/", "R&amp;D", "It&#x27;s <strong>bold</strong> a<b"))
        )

    (document,) = found(retriever_of("brave", serve(app_of(handler))), " ".join("w" * 100))
    assert document.contents == '"R&D"\nIt\'s bold a<b'
    assert seen == [" ".join("w" * 50)]


def test_blocked_domains_and_their_subdomains_are_dropped_counted_and_replaced(serve: Serve) -> None:
    links = [
        "https://huggingface.co/datasets/x",
        "http://www.Quizlet.com:80/a",
        "https://a.b.quizlet.com./q",
        "https://notquizlet.com/",
        "https://quizlet.com.example.org/",
        "https://example.org/?u=quizlet.com",
        "https://last.org/",
    ]
    answer = answer_of("google", *((link, "t", "s") for link in links))
    meter = RetrievalMeter()
    domains = ("HuggingFace.co", ".quizlet.com")
    documents = found(
        retriever_of("google", serve(app_of(always(answer))), meter=meter, blocked_domains=domains)
    )
    assert [document.id for document in documents] == links[3:6]
    assert [document.score for document in documents] == [1, 1 / 2, 1 / 3]
    assert meter.counts["results_blocked"] == 3


@pytest.mark.parametrize("domain", ["", ".", "https://x.org", "x.org/path", "a b"])
def test_a_blocked_domain_that_is_none_is_refused(serve: Serve, domain: str) -> None:
    with pytest.raises(ConfigError, match="blocked_domains"):
        retriever_of("google", "http://127.0.0.1:9", blocked_domains=(domain,))


def test_the_rate_is_kept_by_all_searches_together(serve: Serve) -> None:
    arrivals: list[float] = []

    async def handler(_: Request) -> Response:
        arrivals.append(time.monotonic())
        return JSONResponse(answer_of("google"))

    retriever = retriever_of("google", serve(app_of(handler)), requests_per_second=40.0)
    assert run(retriever, *(f"q{i}" for i in range(21))) == [[]] * 21
    assert arrivals[-1] - arrivals[0] == pytest.approx(20 / 40, abs=0.15)
    # No burst, neither at the start nor later: over any 10 intervals it takes the time of 10, but for jitter.
    assert min(arrivals[i + 10] - arrivals[i] for i in range(11)) > 10 / 40 - 0.1


def test_a_rate_that_leaves_no_turn_in_time_fails_at_once_and_takes_none() -> None:
    async def scenario() -> float:
        rate = RateLimit(2.0)
        deadline = time.monotonic() + 0.2
        await rate.wait(deadline)
        for _ in range(5):
            with pytest.raises(RetrievalError, match=r"requests_per_second=2 .* raise it") as caught:
                await rate.wait(deadline)
            assert caught.value.kind is FailureKind.OVERLOADED
        start = time.monotonic()
        await rate.wait(start + 5.0)
        return time.monotonic() - start

    assert asyncio.run(scenario()) == pytest.approx(0.5, abs=0.1)
    for nonsense in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="requests_per_second"):
            RateLimit(nonsense)


def test_the_bound_on_requests_is_kept_retries_included(serve: Serve) -> None:
    arrivals = 0

    async def handler(_: Request) -> Response:
        nonlocal arrivals
        arrivals += 1
        return JSONResponse(answer_of("google"), 500 if arrivals == 1 else 200)

    retriever = retriever_of("google", serve(app_of(handler)), max_requests=5)
    results = run(retriever, *(f"q{i}" for i in range(9)))
    errors = [error for error in results if isinstance(error, RetrievalError)]
    assert arrivals == 5
    assert [error.kind for error in errors] == [FailureKind.OVERLOADED] * 5
    assert "retrieval.web.max_requests=5 " in str(errors[0])


@pytest.mark.parametrize("query", ["", " ", "a\0b", "\ud800"])
def test_a_query_that_cannot_be_sent_is_rejected_without_a_request(query: str) -> None:
    error = failure(retriever_of("google", "http://127.0.0.1:9"), query)
    assert error.kind is FailureKind.REJECTED


def test_closing_ends_searches_under_way_and_cancelling_one_stays_a_cancellation(serve: Serve) -> None:
    async def handler(_: Request) -> Response:
        await asyncio.sleep(0.3)
        return JSONResponse(answer_of("google"))

    async def scenario() -> list[list[Document] | BaseException]:
        retriever = retriever_of("google", url)
        searches = [asyncio.create_task(retriever.search(f"q{i}", 1)) for i in range(4)]
        await asyncio.sleep(0.1)
        searches[0].cancel()
        await asyncio.sleep(0)
        await retriever.aclose()
        late = asyncio.create_task(retriever.search("late", 1))
        return await asyncio.gather(*searches, late, return_exceptions=True)

    url = serve(app_of(handler))
    first, *others = asyncio.run(scenario())
    assert isinstance(first, asyncio.CancelledError)
    assert [e.kind for e in others if isinstance(e, RetrievalError)] == [FailureKind.UNAVAILABLE] * 4


def test_missing_and_malformed_keys_are_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, variable in [(RetrievalKind.google, "SERPER_API_KEY"), (RetrievalKind.brave, "BRAVE_API_KEY")]:
        for value in ("", " ", f"{KEY}\n{KEY}", f"“{KEY}”"):
            monkeypatch.setenv(variable, value)
            with pytest.raises(ConfigError, match=variable) as caught:
                opened(kind, WebConfig())
            assert KEY not in str(caught.value)


def opened(kind: RetrievalKind, web: WebConfig) -> Any:
    return open_web_retriever(
        kind, web, timeout_s=1.0, deadline_s=2.0, max_concurrency=4, meter=RetrievalMeter()
    )


def test_every_kind_can_be_opened_and_bad_addresses_are_refused() -> None:
    for kind in ("google", "brave", "searxng", "mcp"):
        asyncio.run(opened(RetrievalKind(kind), WebConfig(url="http://127.0.0.1:9/mcp")).aclose())
    for kind in ("searxng", "mcp"):
        for url in ("", "127.0.0.1:8888", "ftp://x", "http://", f"x?key={KEY}"):
            with pytest.raises(ConfigError, match=r"retrieval\.web\.url") as caught:
                opened(RetrievalKind(kind), WebConfig(url=url))
            assert KEY not in str(caught.value)
    with pytest.raises(ConfigError, match="no search of the web"):
        opened(RetrievalKind.none, WebConfig())


def test_the_identity_names_what_decides_answers_and_nothing_else() -> None:
    base = WebConfig(url="http://127.0.0.1:8888")
    identity = source_identity(RetrievalKind.google, base)
    assert json.loads(identity.removeprefix("google "))["country"] == "us"
    others = [
        source_identity(RetrievalKind.brave, base),
        source_identity(RetrievalKind.google, WebConfig(country="de")),
        source_identity(RetrievalKind.google, WebConfig(language="de")),
        source_identity(RetrievalKind.google, WebConfig(snippet_only=False)),
        source_identity(RetrievalKind.google, WebConfig(blocked_domains=())),
        source_identity(RetrievalKind.searxng, base),
        source_identity(RetrievalKind.searxng, WebConfig(url="http://127.0.0.1:8889")),
        source_identity(RetrievalKind.mcp, base),
        source_identity(RetrievalKind.mcp, WebConfig(url="http://127.0.0.1:8888", tool="find")),
    ]
    assert len({identity, *others}) == 10
    same = WebConfig(proxy="http://127.0.0.1:3128", requests_per_second=1.0, max_requests=3, tool="x")
    same.blocked_domains = tuple(reversed(base.blocked_domains))
    assert source_identity(RetrievalKind.google, same) == identity
    keyed = WebConfig(url=f"https://me:{KEY}@x.org/mcp/?key={KEY}")
    assert "https://x.org/mcp" in source_identity(RetrievalKind.mcp, keyed)
    assert KEY not in source_identity(RetrievalKind.mcp, keyed)


def test_searches_go_through_the_proxy(serve: Serve) -> None:
    hosts: list[str] = []

    async def handler(request: Request) -> Response:
        hosts.append(request.headers["host"])
        return JSONResponse(answer_of("searxng", *RESULTS))

    proxy = serve(app_of(handler))
    assert len(found(retriever_of("searxng", "http://searx.test", proxy=proxy))) == 3
    assert hosts == ["searx.test"]


def test_the_client_modules_are_short_and_light() -> None:
    folder = Path(__file__).parents[2] / "src" / "searchrl" / "retrieval"
    for name in ("google", "brave", "searxng", "mcp_search"):
        assert len((folder / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 100
    heavy = ["torch", "transformers", "faiss", "bm25s", "numpy", "mcp", "httpx2", "lxml"]
    program = (
        "import sys, json, searchrl.retrieval.web, searchrl.retrieval.mcp_search, searchrl.retrieval.google\n"
        f"print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    environment = {"PYTHONPATH": str(folder.parents[1])}
    output = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    assert json.loads(output.stdout) == []


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("One line.", [WebResult("", "One line.", "One line.")]),
        ('"Title"\nText\nmore', [WebResult("", "Title", "Text\nmore")]),
        ("3", [WebResult("", "3", "3")]),
        ("[1, 2]", [WebResult("", "[1, 2]", "[1, 2]")]),
        ("[]", []),
        ('{"results": []}', []),
        ('{"title": "T", "link": "L", "snippet": "S"}', [WebResult("L", "T", "S")]),
        ('{"results": [{"url": "L", "content": "C"}]}', [WebResult("L", "L", "C")]),
        (
            json.dumps([{"title": "A", "text": "a"}, {"x": 1}]),
            [WebResult("", "A", "a"), WebResult("", "", "")],
        ),
        ("[" * 100_000, [WebResult("", "[" * 100_000, "[" * 100_000)]),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_the_text_of_an_mcp_tool_can_hold(text: str, results: list[WebResult]) -> None:
    assert list(results_in(text)) == results
