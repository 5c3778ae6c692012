"""What a search server counts, as Prometheus metrics in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = tuple(float(2**i) for i in range(11))


class QueryOutcome(StrEnum):
    """How a query of an accepted request ended. Each ends in exactly one of these ways."""

    COMPUTED = "computed"
    JOINED = "joined"
    """Another request waited for the same, or this one asked twice."""
    CACHED = "cached"
    FAILED = "failed"
    """The index raised."""
    EXPIRED = "expired"
    """Not computed: the time its client would wait was over."""
    ABANDONED = "abandoned"
    """Not computed: its client left."""


class ServerMetrics:
    """The metrics of one application; two in one process do not share any."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        prefix = "searchrl_retrieval"
        self._requests = Counter(
            f"{prefix}_requests", "Answers of POST /retrieve.", ["status"], registry=registry
        )
        self._request_seconds = Histogram(
            f"{prefix}_request_seconds",
            "From a request's header to its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._queries = Counter(
            f"{prefix}_queries", "Queries of accepted requests.", ["outcome"], registry=registry
        )
        for outcome in QueryOutcome:
            self._queries.labels(outcome)  # shown as 0 from the start
        self._batch_size = Histogram(
            f"{prefix}_batch_size", "Queries computed together.", buckets=_SIZES, registry=registry
        )
        self._wait_seconds = Histogram(
            f"{prefix}_queue_seconds",
            "A query's wait for the compute thread.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._compute_seconds = Histogram(
            f"{prefix}_compute_seconds", "Computing one batch.", buckets=_SECONDS, registry=registry
        )
        self._queue = Gauge(f"{prefix}_queue_depth", "Distinct queries waiting.", registry=registry)
        self._cache = Gauge(f"{prefix}_cache_entries", "Answers remembered.", registry=registry)
        self._rows = Gauge(f"{prefix}_index_rows", "Passages served.", registry=registry)
        self._info = Info(f"{prefix}_index", "What is served.", registry=registry)

    def describe(self, *, rows: int, fingerprint: str, version: str) -> None:
        """Say what is served."""
        self._rows.set(rows)
        self._info.info({"fingerprint": fingerprint, "version": version})

    def watch(self, *, queue: Callable[[], float], cache: Callable[[], float]) -> None:
        """Read these whenever the metrics are."""
        self._queue.set_function(queue)
        self._cache.set_function(cache)

    def request(self, status: int, seconds: float) -> None:
        """Count one answer of ``POST /retrieve``."""
        self._requests.labels(str(status)).inc()
        self._request_seconds.observe(seconds)

    def query(self, outcome: QueryOutcome) -> None:
        """Count one query that was not computed, or failed."""
        self._queries.labels(outcome).inc()

    def batch(self, waits: Sequence[float], seconds: float) -> None:
        """Count the queries of a computed batch, one wait [s] each, and the seconds it took."""
        self._queries.labels(QueryOutcome.COMPUTED).inc(len(waits))
        self._batch_size.observe(len(waits))
        self._compute_seconds.observe(seconds)
        for wait in waits:
            self._wait_seconds.observe(wait)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the body that Prometheus scrapes and its content type, as the ``Accept`` header wants it."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
