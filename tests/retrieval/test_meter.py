"""Searches are counted by how they ended; ranks add up."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from searchrl.retrieval.meter import MeteredRetriever, RetrievalMeter, merge_stats
from searchrl.retrieval.types import FailureKind, RetrievalError, SearchStatus
from searchrl.trajectory import Document


class Scripted:
    """A foreign search engine: what it is asked says how it answers."""

    def __init__(self) -> None:
        self.closed = False

    async def search(self, query: str, top_k: int) -> list[Document]:
        if query in ("some", "none"):
            return [Document(id="1", contents='"T"\nt', score=1.0)] * (top_k if query == "some" else 0)
        raise RetrievalError(query, kind=FailureKind(query))

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (FailureKind.TIMEOUT, SearchStatus.TIMEOUT),
        (FailureKind.OVERLOADED, SearchStatus.RATE_LIMITED),
        (FailureKind.UNAVAILABLE, SearchStatus.ERROR),
        (FailureKind.BAD_RESPONSE, SearchStatus.ERROR),
        (FailureKind.REJECTED, SearchStatus.ERROR),
        (FailureKind.UNAUTHORIZED, SearchStatus.ERROR),
        (FailureKind.WRONG_INDEX, SearchStatus.ERROR),
        (FailureKind.NOT_RECORDED, SearchStatus.ERROR),
    ],
)
def test_every_kind_of_failure_has_a_status(kind: FailureKind, status: SearchStatus) -> None:
    assert RetrievalError("", kind=kind).status is status
    assert len(FailureKind) == 8


def searched(*queries: str) -> RetrievalMeter:
    meter = RetrievalMeter()

    async def run() -> None:
        engine = Scripted()
        retriever = MeteredRetriever(engine, meter)
        for query in queries:
            with contextlib.suppress(RetrievalError):
                await retriever.search(query, 2)
        await retriever.aclose()
        assert engine.closed

    asyncio.run(run())
    return meter


def test_searches_are_counted_by_status_and_only_good_ones_are_timed() -> None:
    stats = searched("some", "some", "none", "timeout", "overloaded", "wrong_index").take()
    assert stats.statuses == {"ok": 2, "empty": 1, "timeout": 1, "rate_limited": 1, "error": 1}
    assert (stats.queries, stats.failed, len(stats.seconds)) == (6, 3, 3)
    metrics = stats.metrics()
    assert metrics["retrieval/failed"] == 3
    assert metrics["retrieval/status/empty"] == 1
    assert 0 <= metrics["retrieval/latency_p50"] <= metrics["retrieval/latency_p99"] < 1


def test_taking_starts_anew() -> None:
    meter = searched("some")
    assert meter.take().queries == 1
    assert meter.take().metrics() == {}


def test_ranks_add_up_and_a_cache_without_a_hit_says_zero() -> None:
    first, second = searched("some", "none", "timeout"), searched("some")
    first.counts["cache_hits"] += 0
    second.counts["retries"] += 2
    merged = merge_stats([first.take(), second.take()])
    assert (merged.queries, merged.failed) == (4, 1)
    assert merged.seconds == sorted(merged.seconds)
    assert merged.metrics()["retrieval/cache_hit"] == 0.0
    assert merged.metrics()["retrieval/retries"] == 2.0
    second.counts["cache_hits"] += 1
    second.searched(SearchStatus.OK, 9.0)
    again = merge_stats([second.take()])
    assert again.metrics()["retrieval/cache_hit"] == 1.0
    assert again.quantile(0.99) == 9.0


def test_quantiles_of_nothing_are_zero() -> None:
    assert searched("timeout").take().metrics()["retrieval/latency_p99"] == 0.0
    assert merge_stats([]).metrics() == {}
