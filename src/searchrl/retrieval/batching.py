"""Dynamic micro-batching: many concurrent requests, one compute thread.

Whenever the thread is free it takes everything queued, up to ``max_batch`` queries. There is no linger: while
it computes, the next batch gathers by itself. A query already queued or being computed is joined, not
repeated (a group of episodes asks the same question at once), and a small LRU remembers recent answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TypeAlias

from searchrl.retrieval.types import Hit

_LOG = logging.getLogger(__name__)

Search: TypeAlias = Callable[[Sequence[str], int], list[list[Hit]]]
_Key: TypeAlias = tuple[str, bytes, int]


class QueueFullError(RuntimeError):
    """More queries are waiting than the queue holds; the caller should come back later."""


class SearchFailedError(RuntimeError):
    """The index raised; the cause is the original error."""


class MicroBatcher:
    """Runs ``search`` for concurrent callers on one event loop.

    ``fingerprint`` names the index and is part of the cache's key. ``max_queue`` bounds the distinct queries
    waiting, ``cache_size`` the answers remembered.
    """

    def __init__(
        self,
        search: Search,
        fingerprint: str,
        *,
        max_batch: int = 128,
        max_queue: int = 4096,
        cache_size: int = 8192,
    ) -> None:
        self._search = search
        self._fingerprint = fingerprint
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._cache_size = cache_size
        self._cache: OrderedDict[_Key, list[Hit]] = OrderedDict()
        self._waiting: OrderedDict[_Key, str] = OrderedDict()
        self._in_flight: dict[_Key, asyncio.Future[list[Hit]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retrieval")
        self._worker: asyncio.Task[None] | None = None
        self.computed = 0
        """Queries that reached the index; the others were joined or remembered."""

    async def submit(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """Return the hits of each query. Raises `QueueFullError` or `SearchFailedError`."""
        keys = [(self._fingerprint, query.encode(), top_k) for query in queries]
        texts = {key: query for key, query in zip(keys, queries, strict=True) if not self._known(key)}
        if len(self._waiting) + len(texts) > self._max_queue:
            raise QueueFullError(
                f"{len(self._waiting)} queries are waiting, the queue holds {self._max_queue}"
            )
        loop = asyncio.get_running_loop()
        for key, query in texts.items():
            self._waiting[key] = query
            self._in_flight[key] = loop.create_future()
        if self._waiting and self._worker is None:
            self._worker = loop.create_task(self._work())
        # Take what is needed from the cache now: it may be evicted while the rest is computed.
        hits = {key: self._remember(key, self._cache[key]) for key in set(keys) if key in self._cache}
        futures = {key: self._in_flight[key] for key in set(keys) if key not in hits}
        # Shielded: others may wait for the same future as a caller that is cancelled.
        answers = await asyncio.gather(*(asyncio.shield(future) for future in futures.values()))
        hits.update(zip(futures, answers, strict=True))
        return [hits[key] for key in keys]

    def close(self) -> None:
        """Stop the compute thread after its current batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _known(self, key: _Key) -> bool:
        return key in self._cache or key in self._in_flight

    def _remember(self, key: _Key, hits: list[Hit]) -> list[Hit]:
        """Make ``key`` the most recent answer; drop the oldest beyond the limit."""
        self._cache[key] = hits
        self._cache.move_to_end(key)
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return hits

    async def _work(self) -> None:
        """Compute batch after batch until nothing waits."""
        while self._waiting:
            size = min(self._max_batch, len(self._waiting))
            batch = [self._waiting.popitem(last=False) for _ in range(size)]
            batch.sort(key=lambda item: item[0][2])  # one call of the index has one top_k
            for top_k, items in groupby(batch, key=lambda item: item[0][2]):
                await self._compute(list(items), top_k)
        self._worker = None

    async def _compute(self, items: list[tuple[_Key, str]], top_k: int) -> None:
        loop = asyncio.get_running_loop()
        keys = [key for key, _ in items]
        texts = [text for _, text in items]
        try:
            answers = await loop.run_in_executor(self._thread, self._search, texts, top_k)
        except Exception as error:  # whatever it is belongs to those who wait; the worker goes on
            _LOG.exception("the index failed on a batch of %d queries", len(items))
            failure = SearchFailedError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            for key in keys:
                future = self._in_flight.pop(key)
                future.set_exception(failure)
                future.exception()  # marks it as seen, should all who waited have left
            return
        self.computed += len(items)
        for key, hits in zip(keys, answers, strict=True):
            self._remember(key, hits)
            self._in_flight.pop(key).set_result(hits)
