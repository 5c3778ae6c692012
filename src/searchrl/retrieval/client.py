"""A retriever over HTTP: coalesces concurrent searches, outlasts restarts, fails with typed errors.

One POST carries up to 64 queries, over at most sixteen connections a server. A connection for each episode
would be the bottleneck: httpx's pool takes time quadratic in its connections.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import httpx

from searchrl.retrieval.endpoints import MAX_REQUESTS, Endpoint, EndpointPool, IndexGuard
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.transport import (
    ConcurrencyLimit,
    Retriable,
    RetryBudget,
    RetryPolicy,
    send,
    with_retries,
)
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.retrieval.wire import (
    INDEX_HEADER,
    TIMEOUT_HEADER,
    TOKEN_VARIABLE,
    is_token,
    parse_answer,
    query_problem,
)
from searchrl.trajectory import Document

_MAX_QUERIES = 64
_CONNECT_TIMEOUT_S = 10.0
# Shorter than servers keep idle connections (uvicorn: 5 s): a request must not meet one that is just closing.
_KEEPALIVE_S = 2.0


class _Waiter(NamedTuple):
    """One search."""

    query: str
    top_k: int
    future: asyncio.Future[list[Document]]
    deadline: float


@dataclass(slots=True, eq=False)
class _Session:
    """What belongs to one event loop, and dies with it."""

    loop: asyncio.AbstractEventLoop
    http: httpx.AsyncClient
    pool: EndpointPool
    queue: deque[_Waiter]
    senders: set[asyncio.Task[None]]
    is_closed: bool = False


class HttpRetriever:
    """Searches one or more servers that speak `wire`'s format and hold the same index.

    ``urls`` are base URLs (``http://127.0.0.1:8000``), with or without ``/retrieve``. ``timeout_s`` bounds
    one request, ``deadline_s`` a whole search: its wait for one of ``max_concurrency`` places, all attempts
    and the pauses between them. While no server works, searches wait for one until their deadline: a restart
    costs time, not trajectories. Connection errors, timeouts, 5xx and 429 are tried again; an answer out of
    format, a refusal and another index than ``expected_index`` (None: that of the first answer) are not.
    ``token`` is sent as a bearer token. ``meter`` counts ``requests`` and ``retries``.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout_s: float = 30.0,
        deadline_s: float = 120.0,
        max_concurrency: int = 256,
        token: str | None = None,
        meter: RetrievalMeter | None = None,
        expected_index: str | None = None,
    ) -> None:
        if not urls:
            raise ValueError("HttpRetriever needs at least one URL")
        for url in urls:
            if httpx.URL(url).scheme not in ("http", "https"):
                raise ValueError(f"{url!r} is no http(s) URL")
        if token and not is_token(token):
            raise ValueError("the token for the search server must be printable ASCII without spaces")
        # A URL given twice is one server with one limit of connections.
        self._bases = list(dict.fromkeys(url.rstrip("/").removesuffix("/retrieve") for url in urls))
        self._policy = RetryPolicy(timeout_s=timeout_s, deadline_s=deadline_s)
        self._limit = ConcurrencyLimit(max_concurrency)
        self._budget = RetryBudget()
        self._meter = meter or RetrievalMeter()
        self._index = IndexGuard(expected_index)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: _Session | None = None

    async def search(self, query: str, top_k: int) -> list[Document]:
        """See `Retriever.search`. Works in whichever event loop calls it."""
        deadline = time.monotonic() + self._policy.deadline_s
        session = self._bind()
        problem = query_problem(query)
        if problem is not None:
            raise RetrievalError(f"the query {problem}", kind=FailureKind.REJECTED)
        async with self._limit.slot(deadline, session.pool.outage):
            if session.is_closed:
                raise _closed()
            waiter = _Waiter(query, top_k, session.loop.create_future(), deadline)
            if not session.queue:  # else it has been asked for, or a sender will do it when it ends
                # Not at once: all episodes that ask in this turn of the loop travel together.
                session.loop.call_soon(self._dispatch, session)
            session.queue.append(waiter)
            # Costs half of asyncio.timeout, and every search of an episode pays for it.
            timer = session.loop.call_later(deadline - time.monotonic(), _expire, session, waiter)
            try:
                return await waiter.future
            finally:
                timer.cancel()

    async def fingerprint(self) -> str | None:
        """Return which index the servers hold, by ``GET /health``; None if they do not tell.

        Answers from another one will be refused. Raises `RetrievalError`, of kind wrong_index if the servers
        hold different ones.
        """
        session = self._bind()
        deadline = time.monotonic() + self._policy.deadline_s

        async def ask(endpoint: Endpoint) -> str | None:
            async def attempt(timeout_s: float) -> str | None:
                url = f"{endpoint.base}/health"
                request = session.http.build_request("GET", url, headers=self._headers)
                try:
                    response = await send(session.http, request, timeout_s=timeout_s, where=url)
                except RetrievalError as error:
                    if error.kind is FailureKind.BAD_RESPONSE:
                        return None  # no such page: a server that is not ours
                    raise
                return _named_index(response)

            return await with_retries(
                attempt, policy=self._policy, deadline=deadline, budget=self._budget, meter=self._meter
            )

        names = await asyncio.gather(*(ask(endpoint) for endpoint in session.pool.endpoints))
        # Names first: one server that tells is enough to expect it of all.
        for name, base in sorted(zip(names, self._bases, strict=True), key=lambda pair: pair[0] is None):
            self._index.check(name, base)
        return names[0]

    async def aclose(self) -> None:
        """Fail what still waits, close the connections. The retriever can be used again."""
        session = self._session
        if session is None or session.loop is not asyncio.get_running_loop():
            return  # never used, or only in a loop that is gone with its connections
        self._session = None
        session.is_closed = True
        _fail(session.queue, _closed())
        session.queue.clear()  # before the senders end, each of which would send what waits
        for sender in session.senders:
            sender.cancel()
        await asyncio.gather(*session.senders, return_exceptions=True)
        await session.pool.aclose()
        await session.http.aclose()

    def _bind(self) -> _Session:
        """Return the running loop's session; that of an earlier loop died with it."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            http = httpx.AsyncClient(
                timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),  # the rest is bounded as a whole
                limits=httpx.Limits(
                    max_connections=(MAX_REQUESTS + 1) * len(self._bases),  # one more for health checks
                    keepalive_expiry=_KEEPALIVE_S,
                ),
                trust_env=False,  # a proxy from the environment must not see loopback traffic
            )
            pool = EndpointPool(self._bases, http, deadline_s=self._policy.deadline_s)
            self._session = _Session(loop, http, pool, deque(), set())
        return self._session

    def _dispatch(self, session: _Session) -> None:
        """Send what waits, as far as connections are free."""
        queue = session.queue
        while queue and len(session.senders) < MAX_REQUESTS * len(self._bases):
            top_k = queue[0].top_k
            batch: list[_Waiter] = []
            later: list[_Waiter] = []
            while queue and len(batch) < _MAX_QUERIES:
                waiter = queue.popleft()
                if not waiter.future.done():  # else its episode was cancelled
                    (batch if waiter.top_k == top_k else later).append(waiter)
            queue.extendleft(reversed(later))
            if batch:
                sender = asyncio.create_task(self._send(session, batch))
                session.senders.add(sender)
                sender.add_done_callback(partial(self._sent, session, batch))

    def _sent(self, session: _Session, batch: list[_Waiter], sender: asyncio.Task[None]) -> None:
        session.senders.discard(sender)
        if sender.cancelled():  # here and not in the task, which may have been cancelled before it began
            _fail(batch, _closed())
        self._dispatch(session)

    async def _send(self, session: _Session, batch: list[_Waiter]) -> None:
        """Bring every waiter of ``batch`` its documents or its error."""
        deadline = max(waiter.deadline for waiter in batch)
        last: Endpoint | None = None

        async def attempt(timeout_s: float) -> None:
            nonlocal last
            while waiting := [waiter for waiter in batch if not waiter.future.done()]:
                try:
                    async with session.pool.lease(len(waiting), deadline=deadline, avoid=last) as last:
                        timeout_s = min(self._policy.timeout_s, max(deadline - time.monotonic(), 0.001))
                        await self._post(session, last, waiting, timeout_s)
                    return
                except Retriable as error:
                    if error.retry_after_s == 0.0:
                        raise
                    # The pool keeps the pause that the server asked for; another may answer meanwhile.
                    self._meter.counts["requests"] += 1
                    self._meter.counts["retries"] += 1

        try:
            await with_retries(
                attempt, policy=self._policy, deadline=deadline, budget=self._budget, meter=self._meter
            )
        except RetrievalError as error:
            if error.kind is FailureKind.REJECTED and len(batch) > 1:
                # One bad query spoils the request: halve until only its own search fails.
                await self._send(session, batch[: len(batch) // 2])
                await self._send(session, batch[len(batch) // 2 :])
                return
            _fail(batch, error)
        except Exception as error:  # a bug here must reach those who wait, who would otherwise wait for ever
            _fail(batch, error)

    async def _post(
        self, session: _Session, endpoint: Endpoint, waiting: list[_Waiter], timeout_s: float
    ) -> None:
        """Ask ``endpoint`` once and hand the documents out."""
        url = f"{endpoint.base}/retrieve"
        top_k = waiting[0].top_k
        # ASCII escapes: any string makes a valid body.
        body = json.dumps({"queries": [w.query for w in waiting], "topk": top_k, "return_scores": True})
        headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            TIMEOUT_HEADER: str(max(int(timeout_s * 1000), 1)),
            **self._headers,
        }
        request = session.http.build_request("POST", url, content=body.encode(), headers=headers)
        try:
            response = await send(session.http, request, timeout_s=timeout_s, where=url)
        except RetrievalError as error:
            if error.kind is not FailureKind.UNAUTHORIZED:
                raise
            message = f"{error}; set {TOKEN_VARIABLE} to the token that the server was given"
            raise RetrievalError(message, kind=error.kind) from error
        # First the format: what is no answer at all names no index either, and may be gone soon.
        results = parse_answer(response.content, num_queries=len(waiting), top_k=top_k)
        self._index.check_answer(response.headers, url)
        for waiter, documents in zip(waiting, results, strict=True):
            if not waiter.future.done():
                waiter.future.set_result(documents)


def _expire(session: _Session, waiter: _Waiter) -> None:
    _fail([waiter], session.pool.too_late())


def _named_index(response: httpx.Response) -> str | None:
    """The index in a health answer: the header, or ``index`` in the body."""
    try:
        record = response.json()
    except (ValueError, RecursionError):
        record = None
    name = response.headers.get(INDEX_HEADER) or (record.get("index") if isinstance(record, dict) else None)
    return name if isinstance(name, str) and name else None


def _closed() -> RetrievalError:
    return RetrievalError("the retriever was closed", kind=FailureKind.UNAVAILABLE)


def _fail(waiters: Iterable[_Waiter], error: Exception) -> None:
    for waiter in waiters:
        if not waiter.future.done():
            # Each its own: raised in several tasks, one exception would collect the traces of all.
            own = RetrievalError(str(error), kind=error.kind) if isinstance(error, RetrievalError) else error
            own.__cause__ = error.__cause__
            waiter.future.set_exception(own)
