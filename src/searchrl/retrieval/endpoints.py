"""Several servers as one: who gets the next request, who is down, whether all answer from the same index."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx

from searchrl.retrieval.transport import BreakerState, CircuitBreaker, Retriable
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.retrieval.wire import INDEX_HEADER

MAX_REQUESTS = 16
"""Requests under way at one server.

Fewer make searches wait for one another where each takes long: 256 episodes, to whom a server gives answers
in 1 s on average, waited 3.2 s with 4 and 1.8 s with 16. 256 single ones would be slower: httpx's pool takes
quadratic time.
"""

_FIRST_PROBE_S = 0.5
_LONGEST_PROBE_S = 5.0
_HEALTH_TIMEOUT_S = 5.0
_JITTER = random.Random()


class Endpoint:
    """One server.

    One failure opens its breaker, for a health check follows at once; only that, not time, half opens it.
    """

    def __init__(self, base: str) -> None:
        self.base = base
        self.breaker = CircuitBreaker(threshold=1, first_pause_s=math.inf, max_pause_s=math.inf)
        self.requests = 0
        """Under way."""
        self.queries = 0
        """In these requests."""
        self.not_before = 0.0
        """The server asked not to be sent anything before this `time.monotonic`."""
        self.failure: Retriable | None = None
        """The last one; None since it has answered."""
        self.probe_s = 0.0
        """Seconds before the next health check, about; grows until a request succeeds."""
        self.last_use = 0
        """Number of the last request, for turns among equals."""


class EndpointPool:
    """Hands out the least loaded of the servers that work, and watches over the others.

    After a failure ``GET /health`` is asked, at once and then every 0.5 to 5 s. An answer that is no server
    error, say a 404 where there is no such page, lets one request pass, and that one's success all others.
    A server that asked for a pause gets it. While there is no server to be had, requests wait for one.
    Belongs to one event loop.
    """

    def __init__(self, bases: Sequence[str], http: httpx.AsyncClient, *, deadline_s: float) -> None:
        self.endpoints = [Endpoint(base) for base in bases]
        self._deadline_s = deadline_s
        self._http = http
        self._changed = asyncio.Event()
        self._probes: dict[Endpoint, asyncio.Task[None]] = {}
        self._uses = 0

    def too_late(self) -> RetrievalError:
        """Make the error of a search whose ``deadline_s`` are over: why the servers gave no answer."""
        failures = [endpoint.failure for endpoint in self.endpoints if endpoint.failure is not None]
        reason = "; ".join(map(str, failures)) or "they were still at work"
        servers = ", ".join(endpoint.base for endpoint in self.endpoints)
        # If some server works, it was too slow.
        kind = failures[-1].kind if len(failures) == len(self.endpoints) else FailureKind.TIMEOUT
        return RetrievalError(f"no answer from {servers} in {self._deadline_s:g} s: {reason}", kind=kind)

    def outage(self) -> RetrievalError | None:
        """Like `too_late`, if every server's last request failed; None otherwise."""
        is_down = all(endpoint.failure is not None for endpoint in self.endpoints)
        return self.too_late() if is_down else None

    @asynccontextmanager
    async def lease(
        self, queries: int, *, deadline: float, avoid: Endpoint | None = None
    ) -> AsyncIterator[Endpoint]:
        """Lend an endpoint for one request of so many ``queries``, another than ``avoid`` if possible.

        The outcome of the block decides what becomes of the endpoint. Raises `RetrievalError` if there is
        none until ``deadline``, a `time.monotonic`.
        """
        endpoint = await self._acquire(deadline, avoid)
        self._uses += 1
        endpoint.last_use = self._uses
        endpoint.requests += 1
        endpoint.queries += queries
        try:
            with endpoint.breaker.watch():
                yield endpoint
            endpoint.probe_s = 0.0
            endpoint.failure = None
        except Retriable as error:
            endpoint.failure = error
            # Not all of its clients at the same moment.
            endpoint.not_before = time.monotonic() + error.retry_after_s * _JITTER.uniform(1.0, 1.1)
            raise
        finally:
            endpoint.requests -= 1
            endpoint.queries -= queries
            if endpoint.breaker.state is BreakerState.OPEN and endpoint not in self._probes:
                probe = asyncio.create_task(self._probe(endpoint))
                self._probes[endpoint] = probe
                probe.add_done_callback(lambda _: self._probes.pop(endpoint, None))
            self._wake()

    async def aclose(self) -> None:
        """Stop the health checks."""
        probes = list(self._probes.values())
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    async def _acquire(self, deadline: float, avoid: Endpoint | None) -> Endpoint:
        while True:
            now = time.monotonic()
            idle = [e for e in self.endpoints if e.requests < MAX_REQUESTS and e.not_before <= now]
            for endpoint in sorted(idle, key=lambda e: (e is avoid, e.queries, e.last_use)):
                if endpoint.breaker.allow():
                    return endpoint
            if now >= deadline:
                raise self.too_late()
            until = min([deadline, *(e.not_before for e in self.endpoints if e.not_before > now)])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until - now):
                    await self._changed.wait()

    def _wake(self) -> None:
        """Let all who wait for an endpoint look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _probe(self, endpoint: Endpoint) -> None:
        """Ask for the endpoint's health until it answers."""
        while endpoint.breaker.state is BreakerState.OPEN:
            await asyncio.sleep(endpoint.probe_s * _JITTER.uniform(0.5, 1.0))
            endpoint.probe_s = min(max(2 * endpoint.probe_s, _FIRST_PROBE_S), _LONGEST_PROBE_S)
            try:
                async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                    response = await self._http.get(f"{endpoint.base}/health")
            except (TimeoutError, httpx.HTTPError) as error:
                late = isinstance(error, TimeoutError | httpx.TimeoutException)
                endpoint.failure = Retriable(
                    f"{endpoint.base}/health does not answer: {type(error).__name__}: {error}",
                    FailureKind.TIMEOUT if late else FailureKind.UNAVAILABLE,
                )
                continue
            if response.status_code < 500:
                endpoint.breaker.heal()
                self._wake()


class IndexGuard:
    """Remembers the index that the run began with, and refuses answers from any other.

    A server names its index in the header ``X-Searchrl-Index``; others than ours do not, and are believed.
    """

    def __init__(self, expected: str | None = None) -> None:
        self._expected = expected
        self._is_told = expected is not None
        """An answer without a name is refused, for those before it had one."""

    def check_answer(self, headers: httpx.Headers, where: str) -> None:
        """Raise `RetrievalError` (wrong_index) unless the answer comes from the expected index."""
        found = headers.get(INDEX_HEADER) or None
        if found is not None or self._is_told:
            self._is_told = True
            self.check(found, where)

    def check(self, found: str | None, where: str) -> None:
        """Like `check_answer`, for the name alone. The first that is seen becomes the expected one."""
        if self._expected is None:
            self._expected = found
        if found != self._expected:
            index = f"index {found}" if found else "an index that it does not name"
            raise RetrievalError(
                f"{where} answers from {index}, but this run began with index {self._expected}; "
                "serve that one there again, or start a new run",
                kind=FailureKind.WRONG_INDEX,
            )
