"""Outages: when searches pause, what ends the pause, and what the user hears of it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

import pytest

from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.outage import PatientRetriever
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.trajectory import Document

MAY_PASS = (
    FailureKind.TIMEOUT,
    FailureKind.UNAVAILABLE,
    FailureKind.OVERLOADED,
    FailureKind.BAD_RESPONSE,
)
FOUND = [Document(id="1", contents='"T"\nt', score=1.0)]


class Source:
    """Fails from one time to another, seconds after its first search, or for some queries always."""

    def __init__(
        self, *, down: tuple[float, float] = (0.0, 0.0), kind: FailureKind = FailureKind.TIMEOUT
    ) -> None:
        self.down = down
        self.kind = kind
        self.first: float | None = None
        self.asked: list[str] = []
        self.takes_s: Callable[[str], float] = lambda _: 0.0

    async def search(self, query: str, top_k: int) -> list[Document]:
        now = time.monotonic()
        self.first = self.first or now
        self.asked.append(query)
        await asyncio.sleep(self.takes_s(query))
        if query == "always" or self.down[0] <= now - self.first < self.down[1]:
            raise RetrievalError(f"{query} failed", kind=self.kind)
        return FOUND

    async def aclose(self) -> None:
        pass


class Bench:
    """A patient retriever and what it said."""

    def __init__(self, source: Source, *, patience_s: float) -> None:
        self.source, self.meter, self.said = source, RetrievalMeter(), list[str]()
        self.retriever = PatientRetriever(
            source, patience_s=patience_s, meter=self.meter, say=self.said.append
        )

    def search(self, *queries: str, after_s: float = 0.0) -> list[object]:
        async def run() -> list[object]:
            await asyncio.sleep(after_s)
            searches = (self.retriever.search(query, 1) for query in queries)
            return list(await asyncio.gather(*searches, return_exceptions=True))

        return asyncio.run(run())


@pytest.mark.parametrize("kind", FailureKind)
def test_failures_that_may_pass_become_a_pause(kind: FailureKind) -> None:
    bench = Bench(Source(down=(0.0, 0.3), kind=kind), patience_s=10.0)
    results = bench.search("a", "b", "c")
    if kind in MAY_PASS:
        assert results == [FOUND] * 3
        assert 0.3 <= bench.meter.paused_s() < 10.0
        # One asked for all while the others waited.
        assert len(bench.source.asked) == 3 + 1 + 3
    else:
        assert [str(error) for error in results] == ["a failed", "b failed", "c failed"]
        assert (bench.meter.paused_s(), len(bench.source.asked)) == (0.0, 3)
    assert bench.said == []  # it was short


def test_a_long_pause_is_announced_and_so_is_its_end() -> None:
    bench = Bench(Source(down=(0.0, 0.8)), patience_s=20.0)
    assert bench.search("a", "b") == [FOUND] * 2
    first, last = bench.said
    assert first == "retriever: no search works, waiting up to retrieval.patience_s=20 s: a failed"
    assert re.fullmatch(r"retriever: searches work again after [1-9] s", last)
    stats = bench.meter.take()
    assert 0.8 <= stats.paused_s < 10.0
    assert bench.meter.take().paused_s == 0.0


def test_patience_ends_and_begins_anew_once_something_has_worked() -> None:
    bench = Bench(Source(down=(0.0, 0.9)), patience_s=0.7)
    start = time.monotonic()
    results = bench.search("a", "b")
    assert sorted(map(str, results)) == ["a failed", "b failed"]
    assert 0.7 <= time.monotonic() - start < 10.0
    assert re.fullmatch(r"retriever: given up after [1-9] s: a failed", bench.said[-1])
    paused = bench.meter.paused_s()
    assert str(bench.search("c")[0]) == "c failed"  # at once: no second pause
    assert bench.meter.paused_s() == paused
    assert bench.search("d", after_s=0.9) == [FOUND]
    bench.source.first, bench.source.down = None, (0.0, 0.3)
    assert bench.search("e") == [FOUND]
    assert bench.meter.paused_s() > paused


def test_a_search_that_fails_while_others_work_just_fails() -> None:
    source = Source()
    source.takes_s = lambda query: 0.2 if query == "always" else 0.0
    bench = Bench(source, patience_s=30.0)
    failed, found = bench.search("always", "fine")
    assert (str(failed), found) == ("always failed", FOUND)
    assert bench.meter.paused_s() == 0.0


def test_without_patience_there_is_no_pause() -> None:
    bench = Bench(Source(down=(0.0, 60.0)), patience_s=0.0)
    start = time.monotonic()
    assert str(bench.search("a")[0]) == "a failed"
    assert time.monotonic() - start < 10.0
    assert bench.said == []


def test_who_waits_can_leave_and_the_pause_goes_on_for_the_others() -> None:
    bench = Bench(Source(down=(0.0, 0.4)), patience_s=20.0)

    async def run() -> list[Document]:
        first = asyncio.create_task(bench.retriever.search("a", 1))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(bench.retriever.search("b", 1))
        await asyncio.sleep(0.1)
        first.cancel()
        return await second

    assert asyncio.run(run()) == FOUND
