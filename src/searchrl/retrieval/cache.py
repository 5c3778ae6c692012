"""Answers on disk, for any retriever: what was paid for once is free, and a recorded run can be replayed.

The key is the query's exact bytes and k: a larger k's answer is not cut to a smaller one, for retrievers that
fuse rankings or fetch pages may rank differently at another depth. Only answers are stored, empty ones
included, never failures. Several processes may share the file, on a local disk.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.recording import CacheError, Record, Recording
from searchrl.retrieval.types import FailureKind, RetrievalError, Retriever
from searchrl.trajectory import Document

_FLUSH_EVERY_S = 0.5
_TRANSIENT = (FailureKind.TIMEOUT, FailureKind.UNAVAILABLE, FailureKind.OVERLOADED)


class DiskCache:
    """The answers of one ``source``, a name that says all that decides an answer: engine, index, settings.

    ``path`` is created if it is missing. Reads take microseconds and happen in the caller's thread; a thread
    of its own writes every half second and on `close`, so that even kill -9 loses no more. Raises
    `CacheError`, after a write that failed at every further call.
    """

    def __init__(self, path: str | Path, source: str) -> None:
        self._reader = Recording.open(Path(path), source)
        self._writer = Recording.open(Path(path), source)
        self._pending: dict[tuple[str, int], Record] = {}
        """Not yet written. Guarded by the lock, like the failure."""
        self._failure: CacheError | None = None
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="searchrl-cache", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Return the open cache."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def get(self, query: str, top_k: int) -> list[Document] | None:
        """Return the recorded answer, None if there is none."""
        with self._lock:
            self._check()
            pending = self._pending.get((query, top_k))
        return pending.answer() if pending is not None else self._reader.read(query, top_k)

    def put(self, query: str, top_k: int, documents: Sequence[Document]) -> None:
        """Record an answer, unless one was recorded before: the first stands. Returns at once."""
        record = Record.of(query, top_k, documents)
        with self._lock:
            self._check()
            self._pending.setdefault((query, top_k), record)

    def flush(self) -> None:
        """Write what has not been written yet. May be called in any thread."""
        self._write()
        with self._lock:
            self._check()

    def close(self) -> None:
        """Write the rest and close the file. Does nothing if it is closed."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        self._write()
        self._writer.close()
        self._reader.close()
        with self._lock:
            self._check()

    def _write_on(self) -> None:
        while not self._closing.wait(_FLUSH_EVERY_S):
            self._write()

    def _write(self) -> None:
        """Write everything pending; keep it, and the failure, if that fails."""
        with self._writing:
            with self._lock:
                batch = dict(self._pending)
            if not batch:
                return
            try:
                self._writer.write(list(batch.values()))
            except CacheError as error:
                with self._lock:
                    self._failure = error
                return
            with self._lock:  # only now: until the commit readers find them here
                for key in batch:
                    del self._pending[key]

    def _check(self) -> None:
        if self._failure is not None:
            raise CacheError(str(self._failure)) from self._failure


@dataclass(slots=True, eq=False)
class _Flight:
    """A search of ``inner`` that is under way."""

    key: tuple[str, int]
    task: asyncio.Task[list[Document]]
    waiting: int = 0
    started: float = field(default_factory=time.monotonic)


class CachedRetriever:
    """Answers from ``cache`` what it has, asks ``inner`` for the rest, once for equal searches under way.

    The episodes of a group begin with the same question at the same time: only one of them asks. ``meter``
    counts ``cache_hits`` and ``joined`` searches. The cache is flushed, not closed, by `aclose`.
    """

    def __init__(self, inner: Retriever, cache: DiskCache, meter: RetrievalMeter | None = None) -> None:
        self._inner = inner
        self._cache = cache
        self._meter = meter or RetrievalMeter()
        self._flights: dict[tuple[str, int], _Flight] = {}

    async def search(self, query: str, top_k: int) -> list[Document]:
        """See `Retriever.search`."""
        asked = time.monotonic()
        while True:
            found = self._cache.get(query, top_k)
            self._meter.counts["cache_hits"] += found is not None  # 0 as well: then the metric says 0
            if found is not None:
                return found
            flight = self._flights.get((query, top_k))
            if flight is None:
                flight = self._start(query, top_k)
            else:
                self._meter.counts["joined"] += 1
            await self._wait(flight)
            try:
                return list(flight.task.result())
            except asyncio.CancelledError as error:
                raise RetrievalError("the retriever was closed", kind=FailureKind.UNAVAILABLE) from error
            except RetrievalError as error:
                # It ran out of the time of who asked first: who joined late has time left and asks again.
                if flight.started < asked - 1.0 and error.kind in _TRANSIENT:
                    continue
                raise RetrievalError(str(error), kind=error.kind) from error

    async def aclose(self) -> None:
        """See `Retriever.aclose`."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._inner.aclose()
        finally:
            await asyncio.to_thread(self._cache.flush)

    def _start(self, query: str, top_k: int) -> _Flight:
        flight = _Flight((query, top_k), asyncio.create_task(self._ask(query, top_k)))
        self._flights[flight.key] = flight
        flight.task.add_done_callback(lambda _: self._forget(flight))
        return flight

    def _forget(self, flight: _Flight) -> None:
        """Let nobody join ``flight`` any more."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    async def _wait(self, flight: _Flight) -> None:
        """Wait until ``flight`` has ended. If all who wait are cancelled, it is."""
        flight.waiting += 1
        try:
            await asyncio.wait([flight.task])
        finally:
            flight.waiting -= 1
            if flight.waiting == 0 and not flight.task.done():
                flight.task.cancel()
                self._forget(flight)

    async def _ask(self, query: str, top_k: int) -> list[Document]:
        documents = await self._inner.search(query, top_k)
        self._cache.put(query, top_k, documents)
        return documents


class ReplayRetriever:
    """Answers from a recording alone, whatever its source: the same documents in every run, at no cost.

    The file is opened for reading. A search that is not recorded is a `RetrievalError` (not_recorded). Raises
    `CacheError` if ``path`` is no recording.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._recording = Recording.open_read_only(self._path)

    @property
    def source(self) -> str:
        """What the answers were recorded from."""
        return self._recording.source

    async def search(self, query: str, top_k: int) -> list[Document]:
        """See `Retriever.search`."""
        found = self._recording.read(query, top_k)
        if found is not None:
            return found
        depths = self._recording.depths(query)
        others = f" (only with {', '.join(f'k={depth}' for depth in depths)})" if depths else ""
        message = f"{self._path} has no answer to {query!r} with k={top_k}{others}; record it first"
        raise RetrievalError(message, kind=FailureKind.NOT_RECORDED)

    async def aclose(self) -> None:
        """Close the file; no search is possible afterwards."""
        self._recording.close()
