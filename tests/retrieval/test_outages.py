"""Servers that die, hang, return, refuse, or answer from another index, while searches go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from searchrl.retrieval.client import HttpRetriever
from searchrl.retrieval.embedded import EmbeddedServer
from searchrl.retrieval.meter import RetrievalMeter
from searchrl.retrieval.types import FailureKind, RetrievalError
from searchrl.trajectory import Document


class Server:
    """A search server in the test's own loop, as somebody else might write it, whose faults can be chosen."""

    def __init__(self, name: str = "d") -> None:
        self.name = name
        self.seconds = 0.0
        """Until an answer; for ever if negative."""
        self.status = 200
        self.health = 404
        self.headers: dict[str, str] = {}
        self.health_body: object = None
        self.page: str | None = None
        """In place of every answer to a search."""
        self.posts: list[float] = []
        self.queries = 0
        self.open = self.most_open = 0
        self._port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Listen, after the first time on the same port again."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """Close the port and cut every connection, as the system does for a killed process."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.seconds = max(self.seconds, 0.0)
        for writer in self._writers:
            writer.transport.abort()
        while self._writers:
            await asyncio.sleep(0.005)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1])) if length else b""
                writer.write(await self._answer(head, body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, head: str, body: bytes) -> bytes:
        while self.seconds < 0:
            await asyncio.sleep(0.02)
        if head.startswith("GET /health"):
            return self._render(self.health, self.health_body)
        self.posts.append(time.monotonic())
        await asyncio.sleep(self.seconds)
        if self.status != 200:
            return self._render(self.status, {"error": "as chosen"})
        if self.page is not None:
            return self._render(200, self.page)
        record = json.loads(body)
        self.queries += len(record["queries"])
        result = [
            [
                {"document": {"id": f"{self.name}{i}", "contents": query}, "score": 1.0}
                for i in range(record["topk"])
            ]
            for query in record["queries"]
        ]
        return self._render(200, {"result": result})

    def _render(self, status: int, record: object) -> bytes:
        body = json.dumps(record).encode()
        headers = {"Content-Length": str(len(body)), **self.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {status} chosen\r\n{lines}\r\n".encode() + body


@asynccontextmanager
async def servers(count: int) -> AsyncIterator[list[Server]]:
    made = [Server("abc"[i]) for i in range(count)]
    for server in made:
        await server.start()
    yield made
    for server in made:
        await server.die()


Results = list[list[Document] | BaseException]


async def ask(retriever: HttpRetriever, queries: Sequence[str], top_k: int = 1) -> Results:
    searches = (retriever.search(query, top_k) for query in queries)
    return await asyncio.gather(*searches, return_exceptions=True)


def assert_right(results: Results, queries: Sequence[str]) -> None:
    for result, query in zip(results, queries, strict=True):
        assert isinstance(result, list), result
        assert [document.contents for document in result] == [query]


def kinds(results: Results) -> Counter[str]:
    return Counter(r.kind.value if isinstance(r, RetrievalError) else type(r).__name__ for r in results)


def run(scenario: Coroutine[object, object, None]) -> None:
    """Run to the end; a test must not hang."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario

    asyncio.run(bounded())


MANY = [f"q{i}" for i in range(600)]


def test_the_faster_server_gets_more() -> None:
    async def scenario() -> None:
        async with servers(2) as (fast, slow):
            fast.seconds, slow.seconds = 0.01, 0.1
            retriever = HttpRetriever([fast.url, slow.url])
            results = []
            for _ in range(5):
                results += await ask(retriever, MANY)
            assert_right(results, MANY * 5)
            assert fast.queries > 2 * slow.queries > 0
            await retriever.aclose()

    run(scenario())


def test_equal_servers_get_the_same() -> None:
    async def scenario() -> None:
        async with servers(2) as (first, second):
            retriever = HttpRetriever([first.url, second.url])
            for query in MANY[:20]:  # one at a time: both are always idle
                assert_right(await ask(retriever, [query]), [query])
            assert first.queries == second.queries == 10
            await retriever.aclose()

    run(scenario())


def test_two_thousand_searches_at_once_need_four_connections() -> None:
    async def scenario() -> None:
        async with servers(1) as (server,):
            retriever, queries = HttpRetriever([server.url]), [f"q{i}" for i in range(2000)]
            assert_right(await ask(retriever, queries), queries)
            assert server.most_open <= 4
            assert len(server.posts) < 2000 / 32
            await retriever.aclose()

    run(scenario())


def test_one_of_two_dies_and_comes_back() -> None:
    async def scenario() -> None:
        async with servers(2) as (first, second):
            first.seconds = second.seconds = 0.02
            retriever = HttpRetriever([first.url, second.url], deadline_s=20.0)
            searching = asyncio.create_task(ask(retriever, MANY))
            await asyncio.sleep(0.03)
            await first.die()
            assert_right(await searching, MANY)
            assert second.queries > 0

            while not first.posts or first.posts[-1] < time.monotonic() - 0.2:
                if first._server is None:
                    await first.start()
                assert_right(await ask(retriever, MANY[:10]), MANY[:10])
                await asyncio.sleep(0.05)
            await retriever.aclose()

    run(scenario())


@pytest.mark.integration
def test_all_die_and_a_restart_costs_time_but_no_search() -> None:
    async def scenario() -> None:
        async with servers(1) as (server,):
            server.seconds = 0.02
            meter = RetrievalMeter()
            retriever = HttpRetriever([server.url], deadline_s=20.0, meter=meter)
            searching = asyncio.create_task(ask(retriever, MANY))
            await asyncio.sleep(0.03)
            await server.die()
            await asyncio.sleep(2.0)
            assert not searching.done()
            await server.start()
            assert_right(await searching, MANY)
            assert 0 < meter.counts["retries"] < 12  # they waited, they did not try again and again
            await retriever.aclose()

    run(scenario())


@pytest.mark.integration
@pytest.mark.parametrize("max_concurrency", [256, 16])  # 300 searches: some never leave the queue
def test_nobody_comes_back(max_concurrency: int) -> None:
    async def scenario() -> None:
        async with servers(2) as dead:
            for server in dead:
                await server.die()
            urls = [server.url for server in dead]
            retriever = HttpRetriever(urls, deadline_s=1.5, max_concurrency=max_concurrency)
            started = time.monotonic()
            results = await ask(retriever, MANY[:300])
            assert 1.3 < time.monotonic() - started < 15.0
            assert kinds(results) == {"unavailable": 300}
            message = str(results[0])
            assert f"no answer from {dead[0].url}, {dead[1].url} in 1.5 s" in message
            assert "ConnectError" in message
            await retriever.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(scenario())


@pytest.mark.integration
def test_a_hung_server_is_left_for_another_until_it_lives() -> None:
    async def scenario() -> None:
        async with servers(2) as (hung, good):
            hung.seconds = -1.0
            retriever = HttpRetriever([hung.url, good.url], timeout_s=0.3, deadline_s=20.0)
            started = time.monotonic()
            assert_right(await ask(retriever, MANY), MANY)
            assert time.monotonic() - started < 10.0
            connections = hung.most_open
            assert_right(await ask(retriever, MANY), MANY)  # now it is known
            assert hung.most_open <= connections + 1  # a health check at most
            assert hung.queries == 0
            hung.seconds = 0.0
            while hung.queries == 0:
                assert_right(await ask(retriever, MANY[:10]), MANY[:10])
                await asyncio.sleep(0.05)
            await retriever.aclose()

    run(scenario())


@pytest.mark.integration
def test_a_hung_server_alone_is_a_typed_error_in_time() -> None:
    async def scenario() -> None:
        async with servers(1) as (hung,):
            hung.seconds = -1.0
            retriever, started = HttpRetriever([hung.url], timeout_s=0.2, deadline_s=1.0), time.monotonic()
            results = await ask(retriever, MANY)
            assert time.monotonic() - started < 10.0
            assert kinds(results) == {"timeout": 600}
            assert "did not answer in 0.2 s" in str(results[0])
            await retriever.aclose()

    run(scenario())


@pytest.mark.integration
def test_each_search_has_its_own_deadline() -> None:
    async def scenario() -> None:
        async with servers(1) as (hung,):
            hung.seconds = -1.0
            retriever, started = HttpRetriever([hung.url], deadline_s=2.0), time.monotonic()
            under_way = [asyncio.create_task(ask(retriever, ["q"], top_k)) for top_k in range(1, 17)]
            early = asyncio.create_task(ask(retriever, ["early"], 17))
            await asyncio.sleep(1.0)
            late = asyncio.create_task(ask(retriever, ["late"], 17))  # waits together with the early one
            await asyncio.wait([*under_way, early])
            assert time.monotonic() - started > 1.9
            assert not late.done()
            await late
            assert 2.9 < time.monotonic() - started < 10.0
            await retriever.aclose()

    run(scenario())


@pytest.mark.integration
def test_a_server_that_always_fails_gets_few_requests_and_leaves_the_work_to_another() -> None:
    async def scenario() -> None:
        async with servers(2) as (broken, good):
            broken.status = 500  # at once: it always is the less loaded
            good.seconds = 0.25
            retriever = HttpRetriever([broken.url, good.url], max_concurrency=600)
            assert_right(await ask(retriever, MANY), MANY)
            assert len(broken.posts) < 10
            assert good.most_open <= 10  # all the work, 64 searches a request
            await retriever.aclose()

            retriever = HttpRetriever([broken.url], deadline_s=2.0, max_concurrency=600)
            broken.posts.clear()
            assert kinds(await ask(retriever, MANY)) == {"unavailable": 600}
            assert len(broken.posts) < 20
            await retriever.aclose()

    run(scenario())


@pytest.mark.integration
@pytest.mark.parametrize("retry_after", ["1", "date"])
def test_an_overloaded_server_is_left_alone_as_long_as_it_asks(retry_after: str) -> None:
    async def scenario() -> None:
        async with servers(2) as (busy, idle):
            busy.status = 503
            busy.headers = {"Retry-After": "1"}
            if retry_after == "date":
                busy.headers = {
                    "Date": "Fri, 01 Jan 2100 00:00:00 GMT",
                    "Retry-After": "Fri, 01 Jan 2100 00:00:01 GMT",
                }
            retriever = HttpRetriever([busy.url, idle.url])
            results = await ask(retriever, MANY[:1])
            busy.status = 200
            while len(busy.posts) < 2:
                results += await ask(retriever, MANY[:1])
                await asyncio.sleep(0.02)
            assert_right(results, MANY[:1] * len(results))
            assert 0.95 < busy.posts[1] - busy.posts[0] < 2.0
            assert len(idle.posts) > 5
            await retriever.aclose()

    run(scenario())


def test_a_server_that_returns_with_another_index_is_refused() -> None:
    async def scenario() -> None:
        async with servers(1) as (server,):
            server.headers = {"X-Searchrl-Index": "one"}
            retriever = HttpRetriever([server.url])
            assert_right(await ask(retriever, ["q"]), ["q"])
            await server.die()
            for headers, told in [
                ({"X-Searchrl-Index": "two"}, "index two"),
                ({}, "an index that it does not name"),
            ]:
                server.headers = headers
                if not headers:
                    await server.die()
                await server.start()
                (error,) = await ask(retriever, ["q"])
                assert isinstance(error, RetrievalError)
                assert error.kind is FailureKind.WRONG_INDEX
                assert f"{server.url}/retrieve answers from {told}, but this run began with index one" in str(
                    error
                )
            await retriever.aclose()

            retriever = HttpRetriever([server.url], expected_index="one")
            assert kinds(await ask(retriever, ["q"])) == {"wrong_index": 1}
            server.headers = {"X-Searchrl-Index": "one"}
            assert_right(await ask(retriever, ["q"]), ["q"])
            await retriever.aclose()

    run(scenario())


def test_a_page_in_place_of_an_answer_is_no_other_index() -> None:
    """A balancer's, say, while the server behind it restarts. It passes, which another index does not."""

    async def scenario() -> None:
        async with servers(1) as (server,):
            server.headers = {"X-Searchrl-Index": "one"}
            retriever = HttpRetriever([server.url], expected_index="one")
            assert_right(await ask(retriever, ["q"]), ["q"])
            server.headers, server.page = {}, "<html>Down for maintenance</html>"
            assert kinds(await ask(retriever, ["q"])) == {"bad_response": 1}
            server.headers, server.page = {"X-Searchrl-Index": "one"}, None
            assert_right(await ask(retriever, ["q"]), ["q"])
            await retriever.aclose()

    run(scenario())


def test_the_fingerprint_is_asked_for_agreed_upon_and_then_expected() -> None:
    async def scenario() -> None:
        async with servers(2) as (first, second):
            urls = [first.url, second.url]
            foreign = HttpRetriever(urls)
            assert await foreign.fingerprint() is None  # no such page
            first.health = second.health = 200
            assert await foreign.fingerprint() is None  # a page that says nothing
            assert_right(await ask(foreign, ["q"]), ["q"])
            await foreign.aclose()

            first.health_body = second.health_body = {"status": "ok", "index": "one"}
            ours = HttpRetriever(urls)
            assert await ours.fingerprint() == "one"
            second.headers = {"X-Searchrl-Index": "two"}
            assert kinds(await ask(ours, MANY[:300])).keys() == {"list", "wrong_index"}
            await ours.aclose()

            second.headers = {}
            for other in ({"index": "two"}, {"status": "ok"}):
                first.health_body, second.health_body = {"index": "one"}, other
                for order in (urls, urls[::-1]):
                    mixed = HttpRetriever(order)
                    with pytest.raises(RetrievalError, match="answers from") as caught:
                        await mixed.fingerprint()
                    assert caught.value.kind is FailureKind.WRONG_INDEX
                    await mixed.aclose()

            first.health_body = second.health_body = {"index": "one"}
            second.health = 503
            starting = HttpRetriever(urls)
            asked = asyncio.create_task(starting.fingerprint())
            await asyncio.sleep(0.2)
            second.health = 200
            assert await asked == "one"
            await starting.aclose()

    run(scenario())


def test_cancelled_searches_are_not_sent_and_harm_nobody() -> None:
    async def scenario() -> None:
        async with servers(1) as (server,):
            server.seconds = 0.1
            retriever = HttpRetriever([server.url], max_concurrency=128)
            tasks = [asyncio.create_task(retriever.search(query, 1)) for query in MANY[:400]]
            await asyncio.sleep(0.03)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert_right(results[1::2], MANY[1:400:2])
            assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
            assert server.queries < 400 - 100
            await retriever.aclose()

    run(scenario())


@pytest.mark.integration
def test_many_searches_and_failures_leave_nothing_behind() -> None:
    async def scenario() -> None:
        async with servers(2) as (first, second):
            retriever = HttpRetriever([first.url, second.url], timeout_s=2.0, deadline_s=3.0)
            await ask(retriever, MANY[:10])
            files, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
            for turn in range(8):
                first.status = [200, 500, 422, 200][turn % 4]
                if turn % 4 == 3:
                    await first.die()
                results = await ask(retriever, MANY)
                assert set(kinds(results)) <= {"list", "rejected"}
                if turn % 4 == 3:
                    await first.start()
            first.status = 200
            before = first.queries
            while first.queries == before:  # until nothing is under repair
                assert_right(await ask(retriever, MANY), MANY)
            assert len(os.listdir("/proc/self/fd")) <= files + 64  # 16 connections a server, both ends
            assert len(asyncio.all_tasks()) <= tasks + 32  # the servers' own, one a connection
            await retriever.aclose()
            for server in (first, second):
                await server.die()
            await asyncio.sleep(0.05)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert len(os.listdir("/proc/self/fd")) < files

    run(scenario())


# --- real processes -------------------------------------------------------------------------------------


@pytest.mark.integration
def test_one_of_two_real_servers_is_killed(bm25_directory: Path, corpus_path: Path, tmp_path: Path) -> None:
    async def scenario(urls: list[str], victim: int) -> Results:
        retriever = HttpRetriever(urls, timeout_s=5.0, deadline_s=30.0)
        results = await ask(retriever, ["capital"], 3)
        for turn in range(6):
            searching = asyncio.create_task(ask(retriever, [f"capital {i}" for i in range(300)], 3))
            if turn == 2:
                await asyncio.sleep(0.005)
                os.kill(victim, signal.SIGKILL)
            results += await searching
        await retriever.aclose()
        return results

    with (
        EmbeddedServer(bm25_directory, corpus_path, log_path=tmp_path / "a") as first,
        EmbeddedServer(bm25_directory, corpus_path, log_path=tmp_path / "b") as second,
    ):
        results = asyncio.run(scenario([first.url, second.url], first.pid))
    assert len(results) == 1801
    assert all(result == results[0] for result in results)


def real_server(port: int, index: Path, corpus: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [
        sys.executable,
        "-m",
        "searchrl.retrieval.server",
        "--index",
        str(index),
        "--corpus",
        str(corpus),
    ]
    process = subprocess.Popen([*command, "--port", str(port)], env=environment)
    while True:
        assert process.poll() is None
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return process


@pytest.mark.integration
def test_a_real_server_is_killed_and_restarted(bm25_directory: Path, corpus_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    process = real_server(port, bm25_directory, corpus_path)

    async def scenario() -> Results:
        nonlocal process
        retriever = HttpRetriever([f"http://127.0.0.1:{port}"], timeout_s=5.0, deadline_s=60.0)
        results = await ask(retriever, ["capital"], 3)
        searching = asyncio.create_task(ask(retriever, [f"capital {i}" for i in range(600)], 3))
        await asyncio.sleep(0.005)
        process.kill()
        process.wait()
        more = asyncio.create_task(ask(retriever, [f"capital {i}" for i in range(600, 900)], 3))
        await asyncio.sleep(0.5)
        process = await asyncio.to_thread(real_server, port, bm25_directory, corpus_path)
        results += await searching + await more
        await retriever.aclose()
        return results

    try:
        results = asyncio.run(scenario())
    finally:
        process.terminate()
        process.wait(20)
    assert len(results) == 901
    assert all(result == results[0] for result in results)
