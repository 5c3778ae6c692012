"""A retriever over HTTP: coalesces concurrent searches, retries within a deadline, fails with typed errors.

One POST carries up to 64 queries over at most four connections. A connection for each episode would be the
bottleneck: httpx's pool takes time quadratic in its connections.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle

import httpx

from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.retrieval.wire import parse_answer
from searchrl.trajectory import Document

_MAX_QUERIES = 64
_MAX_CONNECTIONS = 4
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


@dataclass(kw_only=True, slots=True)
class RetrievalStats:
    """What a client did since it was last asked."""

    queries: int = 0
    """Searches that ended, well or not."""
    failed: int = 0
    requests: int = 0
    """POSTs sent, retries included."""
    retries: int = 0
    p50_s: float = 0.0
    """Median seconds of a successful search, waiting and retries included; 0 if there was none."""
    p99_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Waiter:
    query: str
    top_k: int
    future: asyncio.Future[list[Document]]
    started: float = field(default_factory=time.monotonic)


class HttpRetriever:
    """Searches one or more servers that speak `wire`'s format.

    ``urls`` are base URLs (``http://127.0.0.1:8000``), with or without ``/retrieve``, taken in turn.
    ``timeout_s`` bounds one request, ``max_retries`` and ``deadline_s`` all attempts of one together, the
    deadline from the moment its newest search was asked. Connection errors, timeouts, 5xx and 429 are tried
    again; an answer out of format and a refusal are not.
    """

    def __init__(
        self, urls: Sequence[str], *, timeout_s: float = 30.0, max_retries: int = 5, deadline_s: float = 90.0
    ) -> None:
        if not urls:
            raise ValueError("HttpRetriever needs at least one URL")
        for url in urls:
            if httpx.URL(url).scheme not in ("http", "https"):
                raise ValueError(f"{url!r} is no http(s) URL")
        self._urls = cycle([url.rstrip("/").removesuffix("/retrieve") + "/retrieve" for url in urls])
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._deadline_s = deadline_s
        self._jitter = random.Random()  # its own: retries must not advance a seeded global generator
        self._stats = RetrievalStats()
        self._seconds: list[float] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    async def search(self, query: str, top_k: int) -> list[Document]:
        """See `Retriever.search`. Works in whichever event loop calls it."""
        self._bind()
        waiter = _Waiter(query, top_k, asyncio.get_running_loop().create_future())
        try:
            try:
                query.encode()
            except UnicodeEncodeError as error:
                raise RetrievalError(
                    "the query contains a lone surrogate", kind=FailureKind.REJECTED
                ) from error
            self._queue.append(waiter)
            # Not at once: all episodes that ask in this turn of the loop travel together.
            asyncio.get_running_loop().call_soon(self._dispatch)
            documents = await waiter.future
        except RetrievalError:
            self._stats.queries += 1
            self._stats.failed += 1
            raise
        self._stats.queries += 1
        self._seconds.append(time.monotonic() - waiter.started)
        return documents

    async def aclose(self) -> None:
        """Fail what still waits, close the connections. The retriever can be used again."""
        if self._loop is not asyncio.get_running_loop():
            return  # never used, or only in a loop that is gone with its connections
        _fail(self._queue, RetrievalError("the retriever was closed", kind=FailureKind.UNAVAILABLE))
        self._queue.clear()  # before the senders end, each of which would send what waits
        for sender in self._senders:
            sender.cancel()
        await asyncio.gather(*self._senders, return_exceptions=True)
        await self._http.aclose()
        self._loop = None

    def stats(self) -> RetrievalStats:
        """Return the counters since the last call, and reset them."""
        stats, self._stats = self._stats, RetrievalStats()
        seconds, self._seconds = sorted(self._seconds), []
        if seconds:
            stats.p50_s = seconds[len(seconds) // 2]
            stats.p99_s = seconds[min(len(seconds) - 1, int(len(seconds) * 0.99))]
        return stats

    def _bind(self) -> None:
        """Tie queue and connections to the running loop; those of an earlier loop died with it."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        self._loop = loop
        self._queue: deque[_Waiter] = deque()
        self._senders: set[asyncio.Task[None]] = set()
        self._http = httpx.AsyncClient(
            timeout=self._timeout_s,
            limits=httpx.Limits(max_connections=_MAX_CONNECTIONS),
            trust_env=False,  # a proxy from the environment must not see loopback traffic
        )

    def _dispatch(self) -> None:
        """Send what waits, as far as connections are free."""
        while self._queue and len(self._senders) < _MAX_CONNECTIONS:
            top_k = self._queue[0].top_k
            batch: list[_Waiter] = []
            later: list[_Waiter] = []
            while self._queue and len(batch) < _MAX_QUERIES:
                waiter = self._queue.popleft()
                if not waiter.future.done():  # else its episode was cancelled
                    (batch if waiter.top_k == top_k else later).append(waiter)
            self._queue.extendleft(reversed(later))
            if batch:
                sender = asyncio.create_task(self._send(batch))
                self._senders.add(sender)
                sender.add_done_callback(self._sent)

    def _sent(self, sender: asyncio.Task[None]) -> None:
        self._senders.discard(sender)
        self._dispatch()

    async def _send(self, batch: list[_Waiter]) -> None:
        """Bring every waiter of ``batch`` its documents or its error."""
        try:
            results = await self._attempts(batch)
        except asyncio.CancelledError:
            _fail(batch, RetrievalError("the retriever was closed", kind=FailureKind.UNAVAILABLE))
            raise
        except RetrievalError as error:
            if error.kind is FailureKind.REJECTED and len(batch) > 1:
                # One bad query spoils the request: halve until only its own search fails.
                await self._send(batch[: len(batch) // 2])
                await self._send(batch[len(batch) // 2 :])
                return
            _fail(batch, error)
        except Exception as error:  # a bug here must reach those who wait, who would otherwise wait for ever
            _fail(batch, error)
        else:
            for waiter, documents in zip(batch, results, strict=True):
                if not waiter.future.done():
                    waiter.future.set_result(documents)

    async def _attempts(self, batch: list[_Waiter]) -> list[list[Document]]:
        """POST until it succeeds, is refused, or retries or the time are used up."""
        deadline = max(waiter.started for waiter in batch) + self._deadline_s
        attempt = 0
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                message = f"no free connection to the search server in {self._deadline_s:g} s"
                raise RetrievalError(message, kind=FailureKind.TIMEOUT)
            try:
                return await self._post(batch, min(self._timeout_s, remaining))
            except _RetriableError as error:
                pause = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * self._jitter.uniform(0.5, 1.0)
                pause = max(pause, error.retry_after_s)
                attempt += 1
                if attempt > self._max_retries or time.monotonic() + pause >= deadline:
                    raise RetrievalError(f"{error} (attempt {attempt}, the last)", kind=error.kind) from error
                self._stats.retries += 1
                await asyncio.sleep(pause)

    async def _post(self, batch: list[_Waiter], timeout_s: float) -> list[list[Document]]:
        url = next(self._urls)
        top_k = batch[0].top_k
        # ASCII escapes: any string makes a valid body.
        body = json.dumps(
            {"queries": [w.query for w in batch], "topk": top_k, "return_scores": True}
        ).encode()
        self._stats.requests += 1
        try:
            async with asyncio.timeout(timeout_s):  # httpx's own timeouts start anew with each byte
                response = await self._http.post(
                    url, content=body, headers={"Content-Type": "application/json"}, timeout=timeout_s
                )
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _RetriableError(
                f"{url} did not answer in {timeout_s:.3g} s", FailureKind.TIMEOUT
            ) from error
        except httpx.TransportError as error:
            reason = f"{type(error).__name__}: {error}"
            raise _RetriableError(f"{url} cannot be reached: {reason}", FailureKind.UNAVAILABLE) from error
        except httpx.DecodingError as error:
            message = f"{url} sent a broken content encoding: {error}"
            raise RetrievalError(message, kind=FailureKind.BAD_RESPONSE) from error
        _check_status(response, url)
        return parse_answer(response.content, num_queries=len(batch), top_k=top_k)


class _RetriableError(Exception):
    """A failure that another attempt may not have."""

    def __init__(self, message: str, kind: FailureKind, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


def _check_status(response: httpx.Response, url: str) -> None:
    """Raise if the answer is not a success."""
    status = response.status_code
    if status == 200:
        return
    message = f"{url} answered {status}: {response.text[:300]}"
    if status in (429, 503):
        header = response.headers.get("retry-after", "")
        pause = min(float(header), _LONGEST_PAUSE_S) if header.isascii() and header.isdigit() else 0.0
        raise _RetriableError(message, FailureKind.OVERLOADED, pause)
    if status == 408:
        raise _RetriableError(message, FailureKind.TIMEOUT)
    if status >= 500:
        raise _RetriableError(message, FailureKind.UNAVAILABLE)
    if status in (400, 413, 414, 422):
        raise RetrievalError(message, kind=FailureKind.REJECTED)
    # A redirect, a missing page, a login: this is not our server, and no query is to blame.
    raise RetrievalError(message, kind=FailureKind.BAD_RESPONSE)


def _fail(waiters: Sequence[_Waiter] | deque[_Waiter], error: Exception) -> None:
    for waiter in waiters:
        if not waiter.future.done():
            waiter.future.set_exception(error)
