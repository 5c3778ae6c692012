"""What the web clients share: rate, cost and concurrency limits, retries, leak control, pages, documents.

`WebRetriever` makes a `Retriever` of an `Engine`; `open_web_retriever` opens the configured one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Sequence

import httpx

from searchrl.config import ConfigError, RetrievalKind, WebConfig
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.pages import PageError, PageReader, clean, host_of
from searchrl.retrieval.transport import (
    CircuitBreaker,
    ConcurrencyLimit,
    RetryBudget,
    RetryPolicy,
    with_retries,
)
from searchrl.retrieval.types import FailureKind, RetrievalError, Retriever
from searchrl.retrieval.web_engine import Engine, WebResult
from searchrl.retrieval.wire import query_problem
from searchrl.trajectory import Document

MIN_RESULTS = 10
"""What is asked for at least: a page of results costs as much as one of them."""
SPARE_RESULTS = 5
"""Asked for beyond ``top_k``, in place of those on blocked domains."""


class RateLimit:
    """Spaces requests evenly, ``1 / per_second`` apart, first come, first served; idle time saves up none."""

    def __init__(self, per_second: float) -> None:
        if not per_second > 0.0:
            raise ConfigError(f"retrieval.web.requests_per_second={per_second:g} must be more than 0")
        self._per_second = per_second
        self._next_turn = 0.0

    async def wait(self, deadline: float) -> None:
        """Sleep until it is one's turn. The turn of a search that is cancelled meanwhile is lost.

        Raises `RetrievalError` (overloaded) at once if ``deadline``, a `time.monotonic`, is earlier.
        """
        now = time.monotonic()
        turn = max(self._next_turn, now)
        if turn > deadline:
            message = (
                f"retrieval.web.requests_per_second={self._per_second:g} leaves no turn within the deadline; "
                "raise it, or retrieval.deadline_s"
            )
            raise RetrievalError(message, kind=FailureKind.OVERLOADED)
        self._next_turn = turn + 1.0 / self._per_second
        await asyncio.sleep(turn - now)


class WebRetriever:
    """Searches the web with ``engine``. Belongs to one event loop.

    A document's id is the result's link (a hash of its contents if it has none), its contents the title in
    quotes and, on the next line, the snippet; with ``pages`` the text around it in the page instead, where
    that can be read. Its score is 1 / rank. What stands on a blocked domain is dropped.

    ``meter`` also counts ``results_blocked``, ``pages_read`` and ``pages_failed``.
    """

    def __init__(
        self,
        engine: Engine,
        web: WebConfig,
        *,
        policy: RetryPolicy,
        max_concurrency: int,
        meter: RetrievalMeter,
        pages: PageReader | None = None,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._meter = meter
        self._pages = pages
        self._blocked_domains = _domains(web.blocked_domains)
        self._max_requests = web.max_requests
        self._requests = 0
        self._rate = RateLimit(web.requests_per_second)
        self._limit = ConcurrencyLimit(max_concurrency)
        self._budget = RetryBudget()
        self._breaker = CircuitBreaker()
        self._running: set[asyncio.Task[list[Document]]] = set()
        self._closed = False

    async def search(self, query: str, top_k: int) -> list[Document]:
        """See `Retriever.search`."""
        problem = query_problem(query)
        if problem is not None:
            raise RetrievalError(f"the query {problem}", kind=FailureKind.REJECTED)
        if self._closed:
            raise _closed()
        search = asyncio.create_task(self._search(query, top_k))  # a task: `aclose` ends it, not its episode
        self._running.add(search)
        search.add_done_callback(self._running.discard)
        try:
            return await search
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():  # then `aclose` did it
                raise _closed() from None
            raise

    async def aclose(self) -> None:
        """See `Retriever.aclose`."""
        self._closed = True
        running = list(self._running)
        for search in running:
            search.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._engine.aclose()
        if self._pages is not None:
            await self._pages.aclose()

    async def _search(self, query: str, top_k: int) -> list[Document]:
        deadline = time.monotonic() + self._policy.deadline_s
        count = max(MIN_RESULTS, top_k + SPARE_RESULTS)

        async def attempt(timeout_s: float) -> list[WebResult]:
            self._check_bound()
            await self._rate.wait(deadline)
            self._check_bound()  # others may have sent meanwhile
            self._requests += 1
            remaining = max(deadline - time.monotonic(), 0.001)
            return await self._engine.ask(query, count, min(timeout_s, remaining))

        async with self._limit.slot(deadline):
            results = await with_retries(
                attempt,
                policy=self._policy,
                deadline=deadline,
                budget=self._budget,
                meter=self._meter,
                breaker=self._breaker,
            )
            kept = [result for result in results if not self._blocked(result.link)]
            self._meter.counts["results_blocked"] += len(results) - len(kept)
            kept = kept[:top_k]
            texts = await asyncio.gather(*(self._text(result, deadline) for result in kept))
        return [
            _document(rank, result, text)
            for rank, (result, text) in enumerate(zip(kept, texts, strict=True), start=1)
        ]

    async def _text(self, result: WebResult, deadline: float) -> str:
        """Return what the document says: its part of the page, or the snippet."""
        snippet = clean(result.text)
        if self._pages is None or not result.link:
            return snippet
        about = snippet or result.title
        try:
            text = await self._pages.read(result.link, about, blocked=self._blocked, deadline=deadline)
        except PageError:
            self._meter.counts["pages_failed"] += 1
            return snippet
        self._meter.counts["pages_read"] += 1
        return text

    def _blocked(self, link: str) -> bool:
        host = host_of(link)
        return any(host == domain or host.endswith(f".{domain}") for domain in self._blocked_domains)

    def _check_bound(self) -> None:
        if 0 < self._max_requests <= self._requests:
            message = (
                f"retrieval.web.max_requests={self._max_requests} requests have been sent; raise it to go on"
            )
            raise RetrievalError(message, kind=FailureKind.OVERLOADED)


def open_web_retriever(
    kind: RetrievalKind,
    web: WebConfig,
    *,
    timeout_s: float,
    deadline_s: float,
    max_concurrency: int,
    meter: RetrievalMeter,
) -> Retriever:
    """Return the retriever of ``kind``: google, brave, searxng or mcp.

    Raises `ConfigError` if its key is not in the environment, or a setting cannot work.
    """
    return WebRetriever(
        _engine(kind, web),
        web,
        policy=RetryPolicy(timeout_s=timeout_s, deadline_s=deadline_s),
        max_concurrency=max_concurrency,
        meter=meter,
        pages=None if web.snippet_only else PageReader(proxy=web.proxy),
    )


def source_identity(kind: RetrievalKind, web: WebConfig) -> str:
    """Name everything that decides answers: two runs with the same text may share a cache of them.

    How requests travel (key, proxy, rate) does not belong to it; nor does a key that the URL carries.
    """
    place: dict[str, object] = {}
    match kind:
        case RetrievalKind.google | RetrievalKind.brave:
            place = {"country": web.country.lower(), "language": web.language}
        case RetrievalKind.searxng:
            place = {"url": _address(web.url), "language": web.language}
        case RetrievalKind.mcp:
            place = {"url": _address(web.url), "tool": web.tool}
        case _:
            raise ConfigError(f"retrieval.kind={kind} is no search of the web")
    shown = {"snippet_only": web.snippet_only, "blocked_domains": _domains(web.blocked_domains)}
    return f"{kind} {json.dumps(place | shown, sort_keys=True)}"


def _domains(domains: Sequence[str]) -> tuple[str, ...]:
    """Return ``domains`` sorted and lower-case; raise `ConfigError` if one is no domain name."""
    names = sorted({domain.strip().lower().strip(".") for domain in domains})
    for name in names:
        if re.fullmatch(r"[\w-]+(\.[\w-]+)*", name) is None:
            raise ConfigError(
                f"retrieval.web.blocked_domains holds {name!r}; give domain names, such as example.org"
            )
    return tuple(names)


def _address(url: str) -> str:
    return str(httpx.URL(url).copy_with(userinfo=b"", query=None, fragment=None)).rstrip("/")


def _document(rank: int, result: WebResult, text: str) -> Document:
    contents = f'"{clean(result.title)}"\n{text}'
    id_ = clean(result.link) or hashlib.sha256(contents.encode()).hexdigest()[:16]
    return Document(id=id_, contents=contents, score=1.0 / rank)


def _closed() -> RetrievalError:
    return RetrievalError("the retriever was closed", kind=FailureKind.UNAVAILABLE)


def _engine(kind: RetrievalKind, web: WebConfig) -> Engine:
    # Each imported where it is used: the mcp package takes a second to load.
    match kind:
        case RetrievalKind.google:
            from searchrl.retrieval.google import GoogleEngine

            return GoogleEngine(web)
        case RetrievalKind.brave:
            from searchrl.retrieval.brave import BraveEngine

            return BraveEngine(web)
        case RetrievalKind.searxng:
            from searchrl.retrieval.searxng import SearxngEngine

            return SearxngEngine(web)
        case RetrievalKind.mcp:
            from searchrl.retrieval.mcp_search import McpEngine

            return McpEngine(web)
        case _:
            raise ConfigError(f"retrieval.kind={kind} is no search of the web")
