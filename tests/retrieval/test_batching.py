from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from searchrl.retrieval.batching import MicroBatcher, QueueFullError, SearchFailedError
from searchrl.retrieval.types import Hit


class Gate:
    """A search that records its batches and, once closed, waits to be opened."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], int]] = []
        self.open = threading.Event()
        self.open.set()

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        self.batches.append((list(queries), top_k))
        assert self.open.wait(10)
        if "bad" in queries:
            raise ArithmeticError("bad query")
        return [[Hit(len(query), float(top_k))] for query in queries]


async def until_computing(gate: Gate, batches: int) -> None:
    while len(gate.batches) < batches:
        await asyncio.sleep(0.001)


def test_what_arrives_during_a_computation_is_one_batch_and_duplicates_join() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = MicroBatcher(gate.search, "index", max_batch=4)
        gate.open.clear()
        first = asyncio.create_task(batcher.submit(["a"], 3))
        await until_computing(gate, 1)
        words = ["a", "bb", "bb", "ccc", "dddd", "eeeee", "ffffff"]
        others = [asyncio.create_task(batcher.submit([word, "bb"], 3)) for word in words]
        await asyncio.sleep(0.01)
        gate.open.set()
        assert await first == [[Hit(1, 3.0)]]
        answers = await asyncio.gather(*others)
        assert [answer[0][0].row for answer in answers] == [len(word) for word in words]
        assert all(answer[1] == [Hit(2, 3.0)] for answer in answers)
        assert [queries for queries, _ in gate.batches] == [["a"], ["bb", "ccc", "dddd", "eeeee"], ["ffffff"]]
        assert batcher.computed == 6

    asyncio.run(scenario())


def test_answers_are_remembered_by_query_and_top_k() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = MicroBatcher(gate.search, "index", cache_size=2)
        for query, top_k in [("a", 1), ("a", 1), ("a", 2), ("b", 1), ("a", 1), ("A", 1)]:
            assert await batcher.submit([query], top_k) == [[Hit(1, float(top_k))]]
        # The cache holds two: ("a", 1) was dropped when ("b", 1) came, and computed again.
        assert gate.batches == [(["a"], 1), (["a"], 2), (["b"], 1), (["a"], 1), (["A"], 1)]

    asyncio.run(scenario())


def test_one_batch_may_ask_for_different_numbers_of_documents() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = MicroBatcher(gate.search, "index")
        answers = await asyncio.gather(*(batcher.submit(["q"], top_k) for top_k in (5, 1, 5, 3)))
        assert [answer[0][0].score for answer in answers] == [5.0, 1.0, 5.0, 3.0]

    asyncio.run(scenario())


def test_a_full_queue_refuses_and_recovers() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = MicroBatcher(gate.search, "index", max_queue=2)
        gate.open.clear()
        running = asyncio.create_task(batcher.submit(["a"], 1))
        await until_computing(gate, 1)
        waiting = asyncio.create_task(batcher.submit(["b", "c"], 1))
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError, match="2 queries are waiting, the queue holds 2"):
            await batcher.submit(["d"], 1)
        joined = asyncio.create_task(batcher.submit(["c"], 1))  # needs no place
        await asyncio.sleep(0.01)
        gate.open.set()
        assert len(await running) + len(await waiting) + len(await joined) == 4
        assert await batcher.submit(["d"], 1) == [[Hit(1, 1.0)]]

    asyncio.run(scenario())


def test_an_error_reaches_those_who_wait_and_nobody_else() -> None:
    async def scenario() -> None:
        batcher = MicroBatcher(Gate().search, "index")
        with pytest.raises(SearchFailedError, match="ArithmeticError: bad query"):
            await batcher.submit(["bad"], 1)
        assert await batcher.submit(["good"], 1) == [[Hit(4, 1.0)]]
        with pytest.raises(
            SearchFailedError, match="ArithmeticError: bad query"
        ):  # errors are not remembered as answers
            await batcher.submit(["bad"], 1)

    asyncio.run(scenario())


def test_a_caller_that_leaves_takes_nothing_from_the_others() -> None:
    async def scenario() -> None:
        gate = Gate()
        batcher = MicroBatcher(gate.search, "index")
        gate.open.clear()
        leaving = asyncio.create_task(batcher.submit(["a"], 1))
        staying = asyncio.create_task(batcher.submit(["a"], 1))
        await until_computing(gate, 1)
        leaving.cancel()
        gate.open.set()
        assert await staying == [[Hit(1, 1.0)]]

    asyncio.run(scenario())
