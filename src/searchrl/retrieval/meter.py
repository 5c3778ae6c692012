"""What a rank's searches did since it was last asked: counts, statuses, latencies; for any retriever."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from searchrl.retrieval.types import RetrievalError, Retriever, SearchStatus
from searchrl.trajectory import Document


class RetrievalMeter:
    """Counters that the parts of a retriever share.

    `MeteredRetriever` counts searches; transports add what only they see (``requests``, ``retries``), the
    disk cache its ``cache_hits``.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._statuses: Counter[SearchStatus] = Counter()
        self._seconds: list[float] = []
        self._paused_s = 0.0
        self._taken_s = 0.0
        self._pause_began: float | None = None

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """All searches wait while the block runs; pauses do not nest."""
        self._pause_began = time.monotonic()
        try:
            yield
        finally:
            self._paused_s, self._pause_began = self.paused_s(), None

    def paused_s(self) -> float:
        """Seconds that searches have paused so far, all intervals together."""
        running = 0.0 if self._pause_began is None else time.monotonic() - self._pause_began
        return self._paused_s + running

    def searched(self, status: SearchStatus, seconds: float) -> None:
        """Count one search of an episode, waiting and retries included."""
        self._statuses[status] += 1
        if status in (SearchStatus.OK, SearchStatus.EMPTY):
            self._seconds.append(seconds)

    def take(self) -> RetrievalStats:
        """Return what happened since the last call, and start anew."""
        paused_s = self.paused_s()
        stats = RetrievalStats(
            self._statuses, self.counts, sorted(self._seconds), paused_s=paused_s - self._taken_s
        )
        self.counts, self._statuses, self._seconds, self._taken_s = Counter(), Counter(), [], paused_s
        return stats


class RetrievalStats:
    """One interval of a `RetrievalMeter`.

    ``seconds`` are those of searches that worked, sorted; ``paused_s`` those in which all of them waited.
    """

    def __init__(
        self,
        statuses: Counter[SearchStatus],
        counts: Counter[str],
        seconds: list[float],
        *,
        paused_s: float = 0.0,
    ) -> None:
        self.statuses = statuses
        self.counts = counts
        self.seconds = seconds
        self.paused_s = paused_s

    @property
    def queries(self) -> int:
        """Searches that ended, well or not."""
        return self.statuses.total()

    @property
    def failed(self) -> int:
        """Searches that ended in a `RetrievalError`."""
        return self.queries - len(self.seconds)

    def quantile(self, fraction: float) -> float:
        """Seconds that ``fraction`` of the successful searches stayed within; 0 if there was none."""
        if not self.seconds:
            return 0.0
        return self.seconds[min(len(self.seconds) - 1, int(len(self.seconds) * fraction))]

    def metrics(self) -> dict[str, float]:
        """The interval's metrics, ready to log; nothing if nothing was searched and nothing counted."""
        if not self.queries and not self.counts:
            return {}
        named = {
            "retrieval/latency_p50": self.quantile(0.5),
            "retrieval/latency_p99": self.quantile(0.99),
            "retrieval/failed": float(self.failed),
            "retrieval/paused_s": self.paused_s,
        }
        named |= {f"retrieval/status/{status}": float(self.statuses[status]) for status in SearchStatus}
        named |= {f"retrieval/{name}": float(count) for name, count in self.counts.items()}
        if "cache_hits" in self.counts and self.queries:
            named["retrieval/cache_hit"] = self.counts["cache_hits"] / self.queries
        return named


def merge_stats(parts: Sequence[RetrievalStats]) -> RetrievalStats:
    """The searches of all ranks together; of their pauses, which are usually the same one, the longest."""
    statuses: Counter[SearchStatus] = Counter()
    counts: Counter[str] = Counter()
    for part in parts:
        statuses.update(part.statuses)
        counts.update(part.counts)
    return RetrievalStats(
        statuses,
        counts,
        sorted(s for part in parts for s in part.seconds),
        paused_s=max((part.paused_s for part in parts), default=0.0),
    )


class MeteredRetriever:
    """Counts and times the searches of ``inner``."""

    def __init__(self, inner: Retriever, meter: RetrievalMeter) -> None:
        self._inner = inner
        self._meter = meter

    async def search(self, query: str, top_k: int) -> list[Document]:
        """See `Retriever.search`."""
        started = time.monotonic()
        try:
            documents = await self._inner.search(query, top_k)
        except RetrievalError as error:
            self._meter.searched(error.status, time.monotonic() - started)
            raise
        status = SearchStatus.OK if documents else SearchStatus.EMPTY
        self._meter.searched(status, time.monotonic() - started)
        return documents

    async def aclose(self) -> None:
        """See `Retriever.aclose`."""
        await self._inner.aclose()
