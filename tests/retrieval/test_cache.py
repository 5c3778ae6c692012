from __future__ import annotations

import asyncio
import math
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchrl.retrieval.cache import CachedRetriever, DiskCache, ReplayRetriever
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.none import NoRetriever
from searchrl.retrieval.recording import CacheError
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.trajectory import Document

SOURCE = "test engine, index 7"


class Engine:
    """A search engine that notes what it is asked, and answers after a while, or fails first."""

    def __init__(self, seconds: float = 0.0, *failures: FailureKind) -> None:
        self.asked: list[tuple[str, int]] = []
        self.cancelled = 0
        self.seconds = seconds
        self.failures = list(failures)

    async def search(self, query: str, top_k: int) -> list[Document]:
        self.asked.append((query, top_k))
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failures:
            raise RetrievalError("the engine fails", kind=self.failures.pop(0))
        return answer(query, top_k)

    async def aclose(self) -> None:
        pass


def answer(query: str, top_k: int) -> list[Document]:
    """Nothing for queries about nothing; else documents with scores that no short decimal can write."""
    if "nothing" in query:
        return []
    return [
        Document(id=f"{query} {i}", contents=f'"{query}"\n{i}', score=math.pi / (i + 1)) for i in range(top_k)
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "caches" / "a ? b.sqlite"


@pytest.fixture
def cache(path: Path) -> Iterator[DiskCache]:
    with DiskCache(path, SOURCE) as opened:
        yield opened


def test_what_was_recorded_is_answered_at_once_and_after_reopening(path: Path) -> None:
    with DiskCache(path, SOURCE) as cache:
        assert cache.get("q", 2) is None
        cache.put("q", 2, answer("q", 2))
        cache.put("about nothing", 2, [])
        assert cache.get("q", 2) == answer("q", 2)
        cache.flush()
        cache.put("q", 2, answer("other", 2))
    with DiskCache(path, SOURCE) as cache:
        assert cache.get("q", 2) == answer("q", 2)  # the first stands
        assert cache.get("about nothing", 2) == []
        assert cache.get("q", 1) is None  # no prefix of a deeper answer
        assert cache.get("q", 3) is None
        assert cache.get("Q", 2) is None
    cache.close()  # a second time does nothing


TEXT = st.text(max_size=8) | st.sampled_from(["\ud800", "a\0b", "東京 🦊", "'; DROP TABLE answers"])
DOCUMENTS = st.lists(
    st.builds(Document, id=TEXT, contents=TEXT, score=st.floats(allow_nan=False)), max_size=3
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.tuples(TEXT, st.integers(1, 100)), DOCUMENTS, max_size=5))
def test_answers_survive_to_the_last_bit(answers: dict[tuple[str, int], list[Document]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        with DiskCache(path, SOURCE) as cache:
            for (query, top_k), documents in answers.items():
                cache.put(query, top_k, documents)
        with DiskCache(path, SOURCE) as cache:
            found = {key: cache.get(*key) for key in answers}
    assert repr(found) == repr(answers)  # -0.0 and 0.0 are equal, but not the same


def test_it_writes_without_being_told(path: Path, cache: DiskCache) -> None:
    cache.put("q", 1, answer("q", 1))
    deadline = time.monotonic() + 10
    with DiskCache(path, SOURCE) as other:
        while other.get("q", 1) is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_it_waits_for_another_process_that_makes_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.2, lambda: other.execute("COMMIT"))
    timer.start()
    with DiskCache(path, SOURCE) as cache:
        timer.join()
        cache.put("q", 1, [])
    other.close()


def test_another_source_is_refused(path: Path, cache: DiskCache) -> None:
    with pytest.raises(
        CacheError, match=r"a \? b\.sqlite holds answers of 'test .* this run asks 'google'.* file"
    ):
        DiskCache(path, "google")
    cache.put("q", 1, [])


def test_what_is_no_cache_is_left_as_it_is(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"not a database, but a text of some length" * 100)
    foreign = tmp_path / "foreign"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    newer = tmp_path / "newer"
    DiskCache(newer, SOURCE).close()
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    for path, reason in [
        (garbage, "is damaged or no cache"),
        (foreign, "is a database of another program"),
        (newer, "has format 2, this version of searchrl reads 1"),
    ]:
        before = path.read_bytes()
        with pytest.raises(CacheError, match=reason):
            DiskCache(path, SOURCE)
        with pytest.raises(CacheError, match=reason):
            ReplayRetriever(path)
        assert path.read_bytes() == before
    with pytest.raises(CacheError, match="cannot be used: unable to open"):
        DiskCache(tmp_path, SOURCE)


def test_a_torn_file_is_an_error_and_not_a_miss(path: Path) -> None:
    with DiskCache(path, SOURCE) as cache:
        for i in range(200):
            cache.put(f"q{i}", 3, answer(f"q{i}", 3))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])

    def read_all() -> None:
        with DiskCache(path, SOURCE) as cache:
            for i in range(200):
                assert cache.get(f"q{i}", 3) == answer(f"q{i}", 3)

    with pytest.raises(CacheError, match="is damaged"):
        read_all()


def test_a_write_that_fails_is_told_at_the_next_call(path: Path) -> None:
    cache = DiskCache(path, SOURCE)
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE answers")
    connection.close()
    cache.put("q", 1, [])
    with pytest.raises(CacheError, match="no such table"):
        cache.flush()
    with pytest.raises(CacheError, match="no such table"):
        cache.put("p", 1, [])
    with pytest.raises(CacheError, match="no such table"):
        cache.close()


def test_equal_searches_under_way_are_one(cache: DiskCache) -> None:
    engine, meter = Engine(0.05), RetrievalMeter()

    async def scenario() -> list[list[Document]]:
        retriever = CachedRetriever(engine, cache, meter)
        found = await asyncio.gather(*(retriever.search(f"q{i % 3}", 2) for i in range(24)))
        found += await asyncio.gather(*(retriever.search(f"q{i % 3}", 2) for i in range(6)))
        await retriever.aclose()
        return found

    found = asyncio.run(scenario())
    assert found == [answer(f"q{i % 3}", 2) for i in range(30)]
    assert sorted(engine.asked) == [("q0", 2), ("q1", 2), ("q2", 2)]
    assert meter.counts == {"joined": 21, "cache_hits": 6}


def test_failures_are_not_recorded_and_reach_all_who_joined(cache: DiskCache) -> None:
    engine = Engine(0.02, FailureKind.OVERLOADED)

    async def scenario() -> tuple[list[list[Document] | BaseException], list[Document]]:
        retriever = CachedRetriever(engine, cache)
        failed = await asyncio.gather(*(retriever.search("q", 1) for _ in range(3)), return_exceptions=True)
        return failed, await retriever.search("q", 1)

    failed, found = asyncio.run(scenario())
    assert [e.kind for e in failed if isinstance(e, RetrievalError)] == [FailureKind.OVERLOADED] * 3
    assert len({id(e) for e in failed}) == 3
    assert found == answer("q", 1)
    assert len(engine.asked) == 2


@pytest.mark.integration
def test_who_joins_late_does_not_inherit_the_deadline_of_the_first(cache: DiskCache) -> None:
    engine = Engine(1.3, FailureKind.TIMEOUT)

    async def scenario() -> list[list[Document] | BaseException]:
        retriever = CachedRetriever(engine, cache)
        first = asyncio.create_task(retriever.search("q", 1))
        await asyncio.sleep(1.1)
        late = asyncio.create_task(retriever.search("q", 1))
        return list(await asyncio.gather(first, late, return_exceptions=True))

    first, late = asyncio.run(scenario())
    assert isinstance(first, RetrievalError)
    assert late == answer("q", 1)
    assert len(engine.asked) == 2


@pytest.mark.parametrize("turns", [1, 2, 3, 9])
def test_a_cancelled_search_leaves_those_who_joined_and_ends_what_nobody_waits_for(
    cache: DiskCache, turns: int
) -> None:
    engine = Engine(0.1)

    async def scenario() -> list[Document]:
        retriever = CachedRetriever(engine, cache)
        searches = [asyncio.create_task(retriever.search("q", 1)) for _ in range(3)]
        alone = asyncio.create_task(retriever.search("alone", 1))
        await asyncio.sleep(0.02)
        for task in (searches[0], searches[1], alone):
            task.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        again = asyncio.create_task(retriever.search("alone", 1))  # joins no search that is being cancelled
        assert await again == answer("alone", 1)
        return await searches[2]

    assert asyncio.run(scenario()) == answer("q", 1)
    assert (engine.asked, engine.cancelled) == ([("q", 1), ("alone", 1), ("alone", 1)], 1)


def test_closing_fails_what_waits_and_writes_the_rest(path: Path, cache: DiskCache) -> None:
    engine = Engine()

    async def scenario() -> BaseException | list[Document]:
        retriever = CachedRetriever(engine, cache)
        await retriever.search("q", 1)
        engine.seconds = 60.0
        waits = asyncio.create_task(retriever.search("slow", 1))
        await asyncio.sleep(0.01)
        await retriever.aclose()
        assert await ReplayRetriever(path).search("q", 1) == answer("q", 1)
        return (await asyncio.gather(waits, return_exceptions=True))[0]

    error = asyncio.run(scenario())
    assert isinstance(error, RetrievalError)
    assert error.kind is FailureKind.UNAVAILABLE


QUERIES = st.lists(st.tuples(st.sampled_from(["a", "b", "c nothing", "d"]), st.integers(1, 3)), max_size=12)


@settings(max_examples=25, deadline=None)
@given(st.lists(QUERIES, max_size=3))
def test_cached_answers_equal_uncached_ones(rounds: list[list[tuple[str, int]]]) -> None:
    async def scenario(path: Path) -> None:
        with DiskCache(path, SOURCE) as cache:
            engine = Engine()
            cached = CachedRetriever(engine, cache)
            for searches in rounds:
                found = await asyncio.gather(*(cached.search(*search) for search in searches))
                assert found == [answer(*search) for search in searches]
            assert len(engine.asked) == len(set(engine.asked))
        replay = ReplayRetriever(path)
        for search in {search for searches in rounds for search in searches}:
            assert await replay.search(*search) == answer(*search)
        await replay.aclose()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(Path(folder) / "cache"))


def test_replay_answers_what_is_recorded_and_nothing_else(path: Path) -> None:
    async def scenario() -> list[RetrievalError]:
        with DiskCache(path, SOURCE) as cache:
            recorder = CachedRetriever(Engine(), cache)
            for query, top_k in [("q", 2), ("q", 5), ("about nothing", 2)]:
                await recorder.search(query, top_k)
        replay = ReplayRetriever(path)
        assert replay.source == SOURCE
        assert await replay.search("q", 2) == answer("q", 2)
        assert await replay.search("about nothing", 2) == []
        errors = []
        for query, top_k in [("other", 2), ("q", 3), ("\ud800", 1)]:
            with pytest.raises(RetrievalError) as caught:
                await replay.search(query, top_k)
            errors.append(caught.value)
        await replay.aclose()
        return errors

    other, deeper, surrogate = asyncio.run(scenario())
    assert {e.kind for e in (other, deeper, surrogate)} == {FailureKind.NOT_RECORDED}
    assert f"{path} has no answer to 'other' with k=2; record it first" in str(other)
    assert "has no answer to 'q' with k=3 (only with k=2, k=5)" in str(deeper)
    with pytest.raises(CacheError, match=r"there is no recording .*missing; make one with retrieval\.cache="):
        ReplayRetriever(path.parent / "missing")


def test_a_recording_on_a_read_only_disk_is_replayed(path: Path) -> None:
    with DiskCache(path, SOURCE) as cache:
        cache.put("q", 1, answer("q", 1))
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        # Root may write everywhere: what it would open anyway proves nothing, but does no harm either.
        replay = ReplayRetriever(path)
        assert asyncio.run(replay.search("q", 1)) == answer("q", 1)
        asyncio.run(replay.aclose())
        assert [file.name for file in path.parent.iterdir()] == [path.name] or os.geteuid() == 0
    finally:
        path.parent.chmod(0o755)


def test_a_recording_is_replayed_in_another_thread(path: Path) -> None:
    """Rollouts run in one of their own; the recording is opened and closed in the main thread."""
    with DiskCache(path, SOURCE) as cache:
        cache.put("q", 1, answer("q", 1))
    replay = ReplayRetriever(path)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, replay.search("q", 1)).result() == answer("q", 1)
    asyncio.run(replay.aclose())


def test_nothing_at_all_can_be_cached_too(cache: DiskCache) -> None:
    async def scenario() -> list[Document]:
        retriever = CachedRetriever(NoRetriever(), cache)
        return await retriever.search("q", 3) + await retriever.search("q", 3)

    assert asyncio.run(scenario()) == []


WRITER = """
import sys, time
from searchrl.retrieval.cache import DiskCache
from searchrl.trajectory import Document
path, name, count, linger = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
cache = DiskCache(path, "test engine, index 7")
for i in range(count):
    query = f"{name if i % 2 else 'shared'} {i}"
    if cache.get(query, 1) is None:
        cache.put(query, 1, [Document(id=query, contents=name, score=i / 7)])
    if i % 50 == 0:
        cache.flush()
print("written", flush=True)
time.sleep(linger)
cache.close()
"""


def writer(path: Path, name: str, count: int, linger_s: float = 0.0) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-c", WRITER, str(path), name, str(count), str(linger_s)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.integration
def test_several_processes_write_one_file(path: Path) -> None:
    writers = [writer(path, f"w{number}", 400) for number in range(4)]
    assert [process.communicate(timeout=60)[0] for process in writers] == ["written\n"] * 4
    assert [process.returncode for process in writers] == [0] * 4
    with DiskCache(path, SOURCE) as cache:
        for i in range(400):
            names = [f"w{number}" for number in range(4)] if i % 2 else ["shared"]
            for name in names:
                found = cache.get(f"{name} {i}", 1)
                assert found is not None
                assert (found[0].id, found[0].score) == (f"{name} {i}", i / 7)


@pytest.mark.integration
def test_kill_9_loses_no_more_than_the_last_second(path: Path) -> None:
    process = writer(path, "w", 300, linger_s=60.0)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert path.with_name(path.name + "-wal").exists()  # it could not tidy up

    replay = ReplayRetriever(path)
    assert asyncio.run(replay.search("w 299", 1))[0].score == 299 / 7
    asyncio.run(replay.aclose())
    with DiskCache(path, SOURCE) as cache:
        assert all(cache.get(f"{'w' if i % 2 else 'shared'} {i}", 1) for i in range(300))
        cache.put("after", 1, [])
    assert not path.with_name(path.name + "-wal").exists()
