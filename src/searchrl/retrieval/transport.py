"""How a retriever sends requests: what may be tried again, how often, how long, and when it is no use.

A search runs through three gates: a `ConcurrencyLimit`, then for each attempt a `CircuitBreaker`, and before
each further attempt the `RetryBudget`. The usual shape, with one breaker, budget and limit per service::

    async def attempt(timeout_s: float) -> list[Document]:
        response = await send(http, http.build_request("GET", url), timeout_s=timeout_s, where="brave")
        return parse(response.content)

    deadline = time.monotonic() + policy.deadline_s
    async with limit.slot(deadline):
        return await with_retries(
            attempt, policy=policy, deadline=deadline, budget=budget, meter=meter, breaker=breaker
        )
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import TypeVar

import httpx

from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.types import FailureKind, RetrievalError

T = TypeVar("T")

MAX_ANSWER_BYTES = 64 << 20
"""Longer answers are an error: 512 queries with 100 documents of a kilobyte each would not reach it."""

MAX_RETRY_AFTER_S = 30.0
"""A server that asks for a longer pause is asked again after this one."""

_SHORTEST_RETRY_AFTER_S = 0.1  # for it costs no retry budget

_SECRET_HEADERS = ("authorization", "proxy-authorization", "x-api-key", "x-subscription-token")
_JITTER = random.Random()  # its own: retries must not advance a seeded global generator


class Retriable(Exception):  # noqa: N818 - not an error before the last attempt
    """A failure that another attempt may not have; ``retry_after_s``: what the server asked for, else 0."""

    def __init__(self, message: str, kind: FailureKind, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


@dataclass(kw_only=True, slots=True, frozen=True)
class RetryPolicy:
    """How long one search may take, and how long it pauses between attempts."""

    timeout_s: float = 30.0
    """One attempt."""
    deadline_s: float = 120.0
    """The whole search, waiting for its turn included."""
    first_pause_s: float = 0.1
    """Doubled with each attempt."""
    max_pause_s: float = 5.0
    """Back-off grows no further."""


class RetryBudget:
    """Bounds what retries add to the load of a service that fails; shared by all searches of a process.

    A bucket of at most ``reserve`` retries: each first attempt adds ``ratio`` of one, each second
    ``per_second``, so that a client with little traffic recovers too. When it is empty, failures surface
    at once.
    """

    def __init__(self, *, ratio: float = 0.2, reserve: float = 32.0, per_second: float = 1.0) -> None:
        self._ratio = ratio
        self._reserve = reserve
        self._per_second = per_second
        self._tokens = reserve
        self._filled = time.monotonic()

    def deposit(self) -> None:
        """Count a first attempt."""
        self._tokens = min(self._reserve, self._tokens + self._ratio)

    def withdraw(self) -> bool:
        """Take one retry; False if there is none."""
        now = time.monotonic()
        self._tokens = min(self._reserve, self._tokens + (now - self._filled) * self._per_second)
        self._filled = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class BreakerState(StrEnum):
    """States of a `CircuitBreaker`."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Keeps requests away from an endpoint that does not work.

    closed: all requests pass. ``threshold`` failures in a row, with no success between them, open it.
    open: none passes. After a pause (``first_pause_s``, doubled each time up to ``max_pause_s``), or as soon
    as `heal` says that a health check succeeded, it is half open.
    half open: one request passes. Its success closes the breaker, its failure opens it again.

    Every request that `allow` lets pass must end in `succeeded`, `failed` or `abandoned`; `watch` sees to it.
    """

    def __init__(self, *, threshold: int = 3, first_pause_s: float = 0.5, max_pause_s: float = 5.0) -> None:
        self._threshold = threshold
        self._first_pause_s = first_pause_s
        self._max_pause_s = max_pause_s
        self._failures = 0
        self._pause_s = first_pause_s
        self._reopens: float | None = None
        """Monotonic time at which an open breaker lets a trial pass; None: closed."""
        self._trial = False
        """The one request of the half-open state is under way."""

    @property
    def state(self) -> BreakerState:
        """Where it stands now."""
        if self._reopens is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if time.monotonic() >= self._reopens else BreakerState.OPEN

    def allow(self) -> bool:
        """Say whether a request may be sent now; in the half-open state only the first who asks may."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.OPEN or self._trial:
            return False
        self._trial = True
        return True

    def succeeded(self) -> None:
        """The endpoint answered: close."""
        self._failures = 0
        self._pause_s = self._first_pause_s
        self._reopens = None
        self._trial = False

    def failed(self) -> None:
        """A request failed: open, if it was the trial or one too many."""
        self._failures += 1
        was_trial, self._trial = self._trial and self.state is BreakerState.HALF_OPEN, False
        if was_trial or (self._reopens is None and self._failures >= self._threshold):
            self._reopens = time.monotonic() + self._pause_s * _JITTER.uniform(0.5, 1.0)
            self._pause_s = min(2 * self._pause_s, self._max_pause_s)

    def abandoned(self) -> None:
        """A request ended without telling anything about the endpoint: another may be the trial."""
        self._trial = False

    def heal(self) -> None:
        """A health check succeeded: let a trial pass now."""
        if self._reopens is not None:
            self._reopens = time.monotonic()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Report how the request inside the ``with`` block ended."""
        try:
            yield
        except Retriable as error:
            # Too many requests says that the endpoint lives, but not that it can serve.
            if error.kind is FailureKind.OVERLOADED:
                self.abandoned()
            else:
                self.failed()
            raise
        except RetrievalError:  # an answer, if a bad one
            self.succeeded()
            raise
        except BaseException:  # cancelled, or a bug
            self.abandoned()
            raise
        self.succeeded()

    async def admit(self, deadline: float) -> None:
        """Wait until a request may be sent; raise `RetrievalError` (unavailable) at ``deadline``."""
        while not self.allow():
            now = time.monotonic()
            if now >= deadline:
                message = "the service failed several times in a row and did not recover in time"
                raise RetrievalError(message, kind=FailureKind.UNAVAILABLE)
            # While another's trial is under way there is no time to wait for, only its end.
            pause = max((self._reopens or now) - now, 0.05)
            await asyncio.sleep(min(pause, deadline - now))


class ConcurrencyLimit:
    """At most ``max_concurrency`` searches under way at once; more wait, first come, first served."""

    def __init__(self, max_concurrency: int = 256) -> None:
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency is {max_concurrency}; it must be at least 1")
        self._max_concurrency = max_concurrency
        self._loop: asyncio.AbstractEventLoop | None = None
        self._semaphore = asyncio.Semaphore(max_concurrency)

    @asynccontextmanager
    async def slot(
        self, deadline: float, outage: Callable[[], RetrievalError | None] = lambda: None
    ) -> AsyncIterator[None]:
        """Hold a place; if none is free by ``deadline``, raise ``outage()`` or a `RetrievalError` (timeout).

        ``outage`` returns an error if nothing works at all: then those under way are not to blame.
        """
        if self._loop is not asyncio.get_running_loop():  # an earlier loop died with what waited in it
            self._loop, self._semaphore = asyncio.get_running_loop(), asyncio.Semaphore(self._max_concurrency)
        semaphore = self._semaphore
        if semaphore.locked():
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
                    await semaphore.acquire()
            except TimeoutError as error:
                message = f"{self._max_concurrency} searches were under way until this one's deadline"
                raise outage() or RetrievalError(message, kind=FailureKind.TIMEOUT) from error
        else:
            await semaphore.acquire()  # at once
        try:
            yield
        finally:
            semaphore.release()


async def with_retries(
    attempt: Callable[[float], Awaitable[T]],
    *,
    policy: RetryPolicy,
    deadline: float,
    budget: RetryBudget,
    meter: RetrievalMeter,
    breaker: CircuitBreaker | None = None,
) -> T:
    """Return what ``attempt`` returns, called again after each `Retriable` as long as that makes sense.

    ``attempt`` gets the seconds it may take and sends one request; ``deadline`` is a `time.monotonic`. Pauses
    grow and are jittered. A retry after the pause that the server asked for is free: such a server controls
    its own load. All others are paid from ``budget``. ``meter`` counts ``requests`` and ``retries``.
    Raises `RetrievalError`, of the last failure's kind.
    """
    budget.deposit()
    attempts = 0
    last: Retriable | None = None
    while True:
        try:
            if breaker is not None:
                await breaker.admit(deadline)
        except RetrievalError as error:
            if last is None:
                raise
            message = f"{last} (attempt {attempts}, the last: {error})"
            raise RetrievalError(message, kind=last.kind) from last
        attempts += 1
        meter.counts["requests"] += 1
        meter.counts["retries"] += attempts > 1
        try:
            remaining = max(deadline - time.monotonic(), 0.001)
            with breaker.watch() if breaker is not None else nullcontext():
                return await attempt(min(policy.timeout_s, remaining))
        except Retriable as error:
            last = error
            pause = min(policy.first_pause_s * 2 ** min(attempts - 1, 20), policy.max_pause_s)
            pause *= _JITTER.uniform(0.5, 1.0)
            if error.retry_after_s > 0.0:  # the jitter on top: not all of its clients at the same moment
                pause += error.retry_after_s
            if time.monotonic() + pause >= deadline:
                reason = f"the deadline of {policy.deadline_s:g} s leaves no time for another"
            elif error.retry_after_s == 0.0 and not budget.withdraw():
                reason = "too many have failed lately for another"
            else:
                reason = ""
            if reason:
                message = f"{error} (attempt {attempts}, the last: {reason})"
                raise RetrievalError(message, kind=error.kind) from error
            await asyncio.sleep(pause)


async def send(
    http: httpx.AsyncClient,
    request: httpx.Request,
    *,
    timeout_s: float,
    where: str,
    max_bytes: int = MAX_ANSWER_BYTES,
) -> httpx.Response:
    """Send ``request`` and return its successful answer, read whole.

    ``timeout_s`` bounds everything together, ``max_bytes`` the decoded answer. ``where`` names the service in
    messages; it must hold no key. Raises `Retriable` and `RetrievalError`, see `check_status`.
    """
    try:
        async with asyncio.timeout(timeout_s):  # httpx's own timeouts start anew with each byte
            response = await http.send(request, stream=True)
            try:
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > max_bytes:
                        message = f"{where} answered with more than {max_bytes} bytes"
                        raise RetrievalError(message, kind=FailureKind.BAD_RESPONSE)
            finally:
                await response.aclose()
    except (TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as error:
        raise Retriable(f"{where} did not answer in {timeout_s:.3g} s", FailureKind.TIMEOUT) from error
    except httpx.LocalProtocolError:
        # Its text quotes the header, and that may be a key.
        message = f"the request to {where} is not valid HTTP: is its key or token free of line breaks?"
        raise RetrievalError(message, kind=FailureKind.UNAUTHORIZED) from None
    except httpx.TransportError as error:
        reason = f"{type(error).__name__}: {error}"
        raise Retriable(f"{where} cannot be reached: {reason}", FailureKind.UNAVAILABLE) from error
    except httpx.DecodingError as error:
        message = f"{where} sent a broken content encoding: {error}"
        raise RetrievalError(message, kind=FailureKind.BAD_RESPONSE) from error
    headers = [(k, v) for k, v in response.headers.multi_items() if k not in _BODY_HEADERS]
    whole = httpx.Response(response.status_code, headers=headers, content=bytes(body), request=request)
    check_status(whole, where)
    return whole


_BODY_HEADERS = ("content-encoding", "content-length", "transfer-encoding")  # they describe the encoded body


def check_status(response: httpx.Response, where: str) -> None:
    """Return if the answer is a success (200), raise `Retriable` or `RetrievalError` otherwise.

    429, 503: overloaded, retriable after Retry-After. 408, 504: timeout, retriable. Other 5xx: unavailable,
    retriable. 401, 403: unauthorized. 400, 413, 414, 422: rejected. Everything else, say a redirect or a
    missing page: bad_response, for this is not the service, and no query is to blame.
    """
    status = response.status_code
    if status == 200:
        return
    message = f"{where} answered {status}: {_redacted(response)[:300]}"
    if status in (429, 503):
        raise Retriable(message, FailureKind.OVERLOADED, _retry_after_s(response.headers))
    if status in (408, 504):
        raise Retriable(message, FailureKind.TIMEOUT)
    if status >= 500:
        raise Retriable(message, FailureKind.UNAVAILABLE)
    if status in (401, 403):
        raise RetrievalError(message, kind=FailureKind.UNAUTHORIZED)
    if status in (400, 413, 414, 422):
        raise RetrievalError(message, kind=FailureKind.REJECTED)
    raise RetrievalError(message, kind=FailureKind.BAD_RESPONSE)


def _redacted(response: httpx.Response) -> str:
    """The beginning of the answer, without the request's keys, which some services echo."""
    text = response.content[:2000].decode(errors="replace")
    try:
        headers = response.request.headers
    except RuntimeError:  # an answer without a request has no keys
        return text
    for name in _SECRET_HEADERS:
        value = headers.get(name, "")
        for secret in (value, value.removeprefix("Bearer ").strip()):
            if secret:
                text = text.replace(secret, "…")
    return text


def _retry_after_s(headers: httpx.Headers) -> float:
    """Seconds that Retry-After asks for, given as such or as a date; 0 if it is missing or unreadable."""
    value = headers.get("retry-after", "").strip()
    try:
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", value):
            seconds = float(value)
        else:
            # By the server's own clock, if it tells: ours may differ.
            now = parsedate_to_datetime(headers["date"]).timestamp() if "date" in headers else time.time()
            seconds = parsedate_to_datetime(value).timestamp() - now
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, _SHORTEST_RETRY_AFTER_S), MAX_RETRY_AFTER_S) if seconds > 0.0 else 0.0
