from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from searchrl.retrieval.batching import (
    DeadlineError,
    MicroBatcher,
    QueueFullError,
    QueueTooSmallError,
    SearchFailedError,
)
from searchrl.retrieval.server_metrics import QueryOutcome, ServerMetrics
from searchrl.retrieval.wire import Answer


class Gate:
    """A computation that records its batches and, once closed, waits to be opened."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], int]] = []
        self.open = threading.Event()
        self.open.set()

    def compute(self, queries: Sequence[str], top_k: int) -> list[Answer]:
        self.batches.append((list(queries), top_k))
        assert self.open.wait(10)
        if "bad" in queries:
            raise ArithmeticError("bad query")
        return [answer(query, top_k) for query in queries if query != "lost"]


def answer(query: str, top_k: int) -> Answer:
    return [(query.encode(), float(top_k))]


def outcomes(metrics: ServerMetrics) -> dict[str, int]:
    """How many queries ended in which way, without the ways that did not occur."""
    counts = {
        str(outcome): metrics.registry.get_sample_value(
            "searchrl_retrieval_queries_total", {"outcome": outcome}
        )
        for outcome in QueryOutcome
    }
    return {outcome: int(count) for outcome, count in counts.items() if count}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(bounded())


def test_what_arrives_during_a_computation_is_one_batch_and_duplicates_join() -> None:
    async def scenario() -> None:
        gate, metrics = Gate(), ServerMetrics()
        batcher = MicroBatcher(gate.compute, "index", max_batch=4, metrics=metrics)
        gate.open.clear()
        first = asyncio.create_task(batcher.submit(["a"], 3))
        await until(lambda: len(gate.batches) == 1)
        words = ["a", "bb", "bb", "ccc", "dddd", "eeeee", "ffffff"]
        others = [asyncio.create_task(batcher.submit([word, "bb"], 3)) for word in words]
        await until(lambda: batcher.queue_depth == 5)
        gate.open.set()
        assert await first == [answer("a", 3)]
        answers = await asyncio.gather(*others)
        assert answers == [[answer(word, 3), answer("bb", 3)] for word in words]
        assert [queries for queries, _ in gate.batches] == [["a"], ["bb", "ccc", "dddd", "eeeee"], ["ffffff"]]
        assert outcomes(metrics) == {"computed": 6, "joined": 9}

    run(scenario)


def test_answers_are_remembered_by_query_and_top_k() -> None:
    async def scenario() -> None:
        gate, metrics = Gate(), ServerMetrics()
        batcher = MicroBatcher(gate.compute, "index", cache_size=2, metrics=metrics)
        for query, top_k in [("a", 1), ("a", 1), ("a", 2), ("a", 1), ("b", 1), ("a", 2), ("A", 1)]:
            assert await batcher.submit([query], top_k) == [answer(query, top_k)]
        # The cache holds two. When ("b", 1) came, ("a", 2) was the one not used for longest.
        assert gate.batches == [(["a"], 1), (["a"], 2), (["b"], 1), (["a"], 2), (["A"], 1)]
        assert outcomes(metrics) == {"computed": 5, "cached": 2}

    run(scenario)


def test_the_cache_is_bounded_in_bytes_too() -> None:
    async def scenario() -> None:
        batches: list[str] = []

        def compute(queries: Sequence[str], top_k: int) -> list[Answer]:
            batches.extend(queries)
            return [[(b"x" * 10_000, 1.0)] for _ in queries]

        batcher = MicroBatcher(compute, "index", cache_bytes=25_000)
        for query in ["a", "b", "a", "c", "a", "b"]:
            await batcher.submit([query], 1)
        assert batches == ["a", "b", "c", "b"]
        large = MicroBatcher(compute, "index", cache_bytes=5_000)
        await large.submit(["a"], 1)
        await large.submit(["a"], 1)
        assert batches[4:] == ["a", "a"]

    run(scenario)


def test_switched_off_each_query_of_each_request_is_computed_by_itself() -> None:
    async def scenario() -> None:
        gate, metrics = Gate(), ServerMetrics()
        batcher = MicroBatcher(
            gate.compute, "index", max_batch=1, cache_size=0, deduplicate=False, metrics=metrics
        )
        answers = await asyncio.gather(*(batcher.submit(["a", "a", "b"], 1) for _ in range(2)))
        assert answers == [[answer("a", 1), answer("a", 1), answer("b", 1)]] * 2
        assert [queries for queries, _ in gate.batches] == [["a"], ["a"], ["b"]] * 2
        assert outcomes(metrics) == {"computed": 6}

    run(scenario)


def test_a_batch_has_one_top_k_and_the_oldest_query_goes_first() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = MicroBatcher(gate.compute, "index")
        gate.open.clear()
        asked = [("first", 9), ("a", 5), ("b", 1), ("c", 5), ("d", 3), ("e", 1)]
        tasks = []
        for query, top_k in asked:
            tasks.append(asyncio.create_task(batcher.submit([query], top_k)))
            await until(lambda: len(gate.batches) == 1)
        gate.open.set()
        assert await asyncio.gather(*tasks) == [[answer(query, top_k)] for query, top_k in asked]
        assert gate.batches[1:] == [(["a", "c"], 5), (["b", "e"], 1), (["d"], 3)]

    run(scenario)


def test_a_full_queue_refuses_and_recovers() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = MicroBatcher(gate.compute, "index", max_queue=2)
        gate.open.clear()
        running = asyncio.create_task(batcher.submit(["a"], 1))
        await until(lambda: len(gate.batches) == 1)
        waiting = asyncio.create_task(batcher.submit(["b", "c"], 1))
        await until(lambda: batcher.queue_depth == 2)
        with pytest.raises(QueueFullError, match="2 queries are waiting, the queue holds 2") as full:
            await batcher.submit(["d"], 1)
        assert full.value.retry_after_s == 1
        joined = asyncio.create_task(batcher.submit(["c"], 1))  # needs no place
        await asyncio.sleep(0.01)
        gate.open.set()
        assert len(await running) + len(await waiting) + len(await joined) == 4
        assert await batcher.submit(["d"], 1) == [answer("d", 1)]

    run(scenario)


def test_retry_after_follows_the_measured_rate() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = MicroBatcher(gate.compute, "index", max_queue=30)
        gate.open.clear()
        slow = asyncio.create_task(batcher.submit(["slow"], 1))
        await asyncio.sleep(0.6)  # smoothed by 0.2: from now on 0.12 s for each query
        gate.open.set()
        await slow
        gate.open.clear()
        running = asyncio.create_task(batcher.submit(["a"], 1))
        await until(lambda: len(gate.batches) == 2)
        waiting = asyncio.create_task(batcher.submit([str(i) for i in range(30)], 1))
        await until(lambda: batcher.queue_depth == 30)
        with pytest.raises(QueueFullError) as full:
            await batcher.submit(["b"], 1)
        assert 3 <= full.value.retry_after_s <= 5
        gate.open.set()
        await asyncio.gather(running, waiting)

    run(scenario)


def test_a_request_larger_than_the_queue_is_told_so() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = MicroBatcher(gate.compute, "index", max_queue=2)
        with pytest.raises(QueueTooSmallError, match="3 new queries in one request, the queue holds 2"):
            await batcher.submit(["a", "b", "c"], 1)
        assert gate.batches == []
        await batcher.submit(["a", "a", "b"], 1)
        assert len(await batcher.submit(["a", "b", "c"], 1)) == 3  # two of them are known

    run(scenario)


@pytest.mark.parametrize(
    ("query", "reason"), [("bad", "ArithmeticError: bad query"), ("lost", "ValueError: zip")]
)
def test_an_error_reaches_those_who_wait_and_nobody_else(query: str, reason: str) -> None:
    async def scenario() -> None:
        batcher = MicroBatcher(Gate().compute, "index")
        with pytest.raises(SearchFailedError, match=reason):
            await batcher.submit([query], 1)
        assert await batcher.submit(["good"], 1) == [answer("good", 1)]
        with pytest.raises(SearchFailedError, match=reason):  # errors are not remembered as answers
            await batcher.submit([query], 1)

    run(scenario)


def test_a_caller_that_leaves_takes_nothing_from_the_others() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = MicroBatcher(gate.compute, "index")
        gate.open.clear()
        running = asyncio.create_task(batcher.submit(["running"], 1))
        await until(lambda: len(gate.batches) == 1)
        leaving = asyncio.create_task(batcher.submit(["running", "a"], 1))
        staying = asyncio.create_task(batcher.submit(["running", "a"], 1))
        await until(lambda: batcher.queue_depth == 1)
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.sleep(0.01)
        gate.open.set()
        assert await running == [answer("running", 1)]
        assert await staying == [answer("running", 1), answer("a", 1)]

    run(scenario)


def test_what_nobody_waits_for_is_not_computed() -> None:
    async def scenario() -> None:
        gate, metrics = Gate(), ServerMetrics()
        batcher = MicroBatcher(gate.compute, "index", metrics=metrics)
        gate.open.clear()
        running = asyncio.create_task(batcher.submit(["running"], 1))
        await until(lambda: len(gate.batches) == 1)
        leaving = [asyncio.create_task(batcher.submit(["left", "wanted"], 1)) for _ in range(2)]
        patient = asyncio.create_task(batcher.submit(["wanted", "late"], 1))
        await until(lambda: batcher.queue_depth == 3)
        with pytest.raises(DeadlineError):
            await batcher.submit(["late", "too late"], 1, timeout_s=0.02)
        leaving[0].cancel()
        await asyncio.sleep(0.01)
        assert batcher.queue_depth == 3  # the other one still waits for "left"
        leaving[1].cancel()
        await until(lambda: batcher.queue_depth == 2)
        gate.open.set()
        assert await patient == [answer("wanted", 1), answer("late", 1)]
        await running
        assert [queries for queries, _ in gate.batches] == [["running"], ["wanted", "late"]]
        assert outcomes(metrics) == {"computed": 3, "joined": 4, "expired": 1, "abandoned": 1}
        assert await batcher.submit(["left"], 1) == [answer("left", 1)]  # asked again it is new

    run(scenario)
