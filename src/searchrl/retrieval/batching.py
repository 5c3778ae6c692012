"""Dynamic micro-batching: many concurrent requests, one compute thread.

Whenever the thread is free it takes everything queued, up to ``max_batch`` queries. There is no linger: while
it computes, the next batch gathers by itself. A query already queued or being computed is joined, not
repeated (a group of episodes asks the same question at once), and a small LRU remembers recent answers. A
query that nobody waits for any more is not computed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from searchrl.retrieval.server_metrics import QueryOutcome, ServerMetrics
from searchrl.retrieval.wire import Answer

_LOG = logging.getLogger(__name__)

Compute: TypeAlias = Callable[[Sequence[str], int], list[Answer]]
"""Answers several queries with at most that many documents each; called on the compute thread only."""
_Key: TypeAlias = tuple[str, bytes, int]

_MAX_RETRY_AFTER_S = 30
_RATE_SMOOTHING = 0.2
# What Python needs beside the bytes themselves: list, key and links of an entry; tuple and float of a hit.
_ENTRY_BYTES = 400
_DOCUMENT_BYTES = 150


class QueueFullError(RuntimeError):
    """Too many queries are waiting; ``retry_after_s`` is when the queue should be empty, at least 1."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueTooSmallError(RuntimeError):
    """One request has more new queries than the whole queue holds: no waiting helps."""


class DeadlineError(RuntimeError):
    """The caller's time is over."""


class SearchFailedError(RuntimeError):
    """The index raised; the message names its error."""


@dataclass(slots=True, eq=False)
class _Work:
    """A query to compute, for all requests that wait for it."""

    key: _Key
    query: str
    future: asyncio.Future[Answer]
    queued_at: float
    waiters: int = 0


class MicroBatcher:
    """Runs ``compute`` for concurrent callers on one event loop.

    ``fingerprint`` names the index and is part of the cache's key. ``max_queue`` bounds the distinct queries
    waiting, ``cache_size`` and ``cache_bytes`` the answers remembered. ``max_batch=1, cache_size=0,
    deduplicate=False`` computes each query of each request by itself, in the order of arrival.
    """

    def __init__(
        self,
        compute: Compute,
        fingerprint: str,
        *,
        max_batch: int = 128,
        max_queue: int = 8192,
        cache_size: int = 32768,
        cache_bytes: int = 256 << 20,
        deduplicate: bool = True,
        metrics: ServerMetrics | None = None,
    ) -> None:
        if max_batch < 1 or max_queue < 1:
            raise ValueError(f"max_batch={max_batch} and max_queue={max_queue} must be at least 1")
        self._search = compute
        self._fingerprint = fingerprint
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._deduplicate = deduplicate
        self._metrics = metrics or ServerMetrics()
        self._cache = _Cache(cache_size, cache_bytes)
        self._waiting: dict[_Work, None] = {}  # an ordered set, oldest first
        self._in_flight: dict[_Key, _Work] = {}  # waiting or being computed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retrieval")
        self._worker: asyncio.Task[None] | None = None
        self._computing_since: float | None = None
        self._seconds_per_query = 0.0
        self._metrics.watch(queue=lambda: self.queue_depth, cache=lambda: len(self._cache))

    @property
    def queue_depth(self) -> int:
        """Distinct queries waiting for the compute thread."""
        return len(self._waiting)

    @property
    def computing_s(self) -> float:
        """Seconds since the running computation began, 0 if none runs: large if the index hangs."""
        return 0.0 if self._computing_since is None else time.monotonic() - self._computing_since

    async def submit(
        self, queries: Sequence[str], top_k: int, *, timeout_s: float | None = None
    ) -> list[Answer]:
        """Return the answer to each query.

        A caller that is cancelled, or whose ``timeout_s`` is over, takes back those of its queries that
        nobody else waits for.

        Raises:
            QueueFullError: come back later.
            QueueTooSmallError: ask with fewer queries.
            DeadlineError: ``timeout_s`` is over.
            SearchFailedError: the index failed on a batch with one of the queries.
        """
        plan = self._plan(queries, top_k)
        works = {item for item in plan if isinstance(item, _Work)}
        if works:
            await self._wait(works, timeout_s)
        return [item.future.result() if isinstance(item, _Work) else item for item in plan]

    def close(self) -> None:
        """Stop the compute thread after its current batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _plan(self, queries: Sequence[str], top_k: int) -> list[Answer | _Work]:
        """Return for each query its remembered answer or the work that will bring it; queue what is new."""
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        plan: list[Answer | _Work] = []
        new: dict[_Key, _Work] = {}
        fresh: list[_Work] = []
        outcomes: list[QueryOutcome] = []
        for query in queries:
            key = (self._fingerprint, query.encode(), top_k)
            if (answer := self._cache.get(key)) is not None:
                plan.append(answer)
                outcomes.append(QueryOutcome.CACHED)
            elif self._deduplicate and (work := self._in_flight.get(key) or new.get(key)):
                plan.append(work)
                outcomes.append(QueryOutcome.JOINED)
            else:
                new[key] = work = _Work(key, query, loop.create_future(), now)
                fresh.append(work)
                plan.append(work)
        self._admit(len(fresh))
        for outcome in outcomes:
            self._metrics.query(outcome)
        self._waiting.update(dict.fromkeys(fresh))
        if self._deduplicate:
            self._in_flight.update(new)
        if self._waiting and self._worker is None:
            self._worker = loop.create_task(self._work())
        return plan

    def _admit(self, number: int) -> None:
        """Raise unless ``number`` more queries may wait."""
        if number > self._max_queue:
            raise QueueTooSmallError(
                f"{number} new queries in one request, the queue holds {self._max_queue}: send fewer"
            )
        if self.queue_depth + number > self._max_queue:
            seconds = math.ceil(self.queue_depth * self._seconds_per_query)
            raise QueueFullError(
                f"{self.queue_depth} queries are waiting, the queue holds {self._max_queue}",
                retry_after_s=min(max(seconds, 1), _MAX_RETRY_AFTER_S),
            )

    async def _wait(self, works: set[_Work], timeout_s: float | None) -> None:
        """Return once all are computed; raise if one failed or the time is over."""
        for work in works:
            work.waiters += 1
        outcome = QueryOutcome.ABANDONED
        try:
            # Unlike gather, wait leaves the futures alone when it is cancelled: others wait for them too.
            done, pending = await asyncio.wait(
                [work.future for work in works], timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION
            )
            for future in done:
                if (error := future.exception()) is not None:
                    raise SearchFailedError(str(error)) from error
            if pending:
                outcome = QueryOutcome.EXPIRED
                raise DeadlineError(f"no answer in time; {self.queue_depth} queries are waiting")
        finally:
            self._leave(works, outcome)

    def _leave(self, works: Iterable[_Work], outcome: QueryOutcome) -> None:
        """Drop the works that now nobody waits for."""
        for work in works:
            work.waiters -= 1
            if not work.waiters and work in self._waiting:
                del self._waiting[work]
                self._in_flight.pop(work.key, None)
                self._metrics.query(outcome)

    async def _work(self) -> None:
        """Compute batch after batch until nothing waits."""
        try:
            while self._waiting:
                await self._compute(self._take())
        finally:
            self._worker = None

    def _take(self) -> list[_Work]:
        """Take the oldest query and those that can be computed with it: one call has one top_k."""
        top_k = next(iter(self._waiting)).key[2]
        batch = list(islice((work for work in self._waiting if work.key[2] == top_k), self._max_batch))
        for work in batch:
            del self._waiting[work]
        return batch

    async def _compute(self, batch: list[_Work]) -> None:
        """Answer everyone who waits for ``batch``, with an error if it must be."""
        loop = asyncio.get_running_loop()
        texts = [work.query for work in batch]
        self._computing_since = started = time.monotonic()
        try:
            answers = await loop.run_in_executor(self._thread, self._search, texts, batch[0].key[2])
            seconds = time.monotonic() - started
            self._seconds_per_query += _RATE_SMOOTHING * (seconds / len(batch) - self._seconds_per_query)
            for work, answer in zip(batch, answers, strict=True):
                self._cache.put(work.key, answer)
                self._in_flight.pop(work.key, None)
                work.future.set_result(answer)
            self._metrics.batch([started - work.queued_at for work in batch], seconds)
        except Exception as error:  # whatever it is belongs to those who wait; the worker goes on
            _LOG.exception("the index failed on a batch of %d queries", len(batch))
            self._fail(batch, f"{type(error).__name__}: {error}")
        finally:
            self._computing_since = None

    def _fail(self, batch: list[_Work], reason: str) -> None:
        for work in batch:
            if not work.future.done():
                self._metrics.query(QueryOutcome.FAILED)
                self._in_flight.pop(work.key, None)
                work.future.set_exception(SearchFailedError(reason))
                work.future.exception()  # marks it as seen, should all who waited have left


class _Cache:
    """The most recently used answers, bounded in number and, roughly, in bytes."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._bytes = 0
        self._answers: OrderedDict[_Key, Answer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: _Key) -> Answer | None:
        """Return the answer, now the most recently used, or None."""
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def put(self, key: _Key, answer: Answer) -> None:
        """Remember an answer; forget the least recently used ones beyond the limits."""
        if (old := self._answers.pop(key, None)) is not None:
            self._bytes -= _size(key, old)
        self._answers[key] = answer
        self._bytes += _size(key, answer)
        while len(self._answers) > self._max_entries or self._bytes > self._max_bytes:
            self._bytes -= _size(*self._answers.popitem(last=False))


def _size(key: _Key, answer: Answer) -> int:
    return _ENTRY_BYTES + len(key[1]) + sum(_DOCUMENT_BYTES + len(raw) for raw, _ in answer)
