from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from retrieval.processes import listening_on
from searchrl.retrieval.client import HttpRetriever
from searchrl.retrieval.embedded import EmbeddedServer, EmbeddedServerError
from searchrl.retrieval.wire import TOKEN_VARIABLE

pytestmark = pytest.mark.integration

PARENT = """
import sys, os, time
from searchrl.retrieval.embedded import EmbeddedServer
server = EmbeddedServer(sys.argv[1], sys.argv[2], log_path=sys.argv[3])
server.start()
if os.fork() == 0:  # holds the pipe open when the parent is gone
    time.sleep(30)
    os._exit(0)
print(server.pid, server.url, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    """True if the process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_it_serves_stops_and_leaves_nothing(bm25_directory: Path, corpus_path: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs/server.log"
    with EmbeddedServer(bm25_directory, corpus_path, log_path=log, shuffle_seed=3) as server:
        assert httpx.get(f"{server.url}/health", trust_env=False).json()["shuffle_seed"] == 3
        assert listening_on(server.pid) == {
            "0100007F"
        }  # which no other machine reaches; /metrics is there too
        assert httpx.get(f"{server.url}/metrics", trust_env=False).status_code == 200
        retriever = HttpRetriever([server.url])

        async def scenario() -> None:
            assert len(await retriever.search("capital", 3)) == 3
            await retriever.aclose()

        asyncio.run(scenario())
        pid = server.pid
        process = server._process
    assert process is not None
    assert process.returncode == 0, log.read_text()
    assert not alive(pid)
    assert "serving on port" in log.read_text()
    with pytest.raises(EmbeddedServerError, match="is not running"):
        _ = server.url


def test_it_dies_with_a_parent_killed_by_kill_9(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-W", "ignore", "-c", PARENT, str(bm25_directory), str(corpus_path)]
    with subprocess.Popen(
        [*command, str(tmp_path / "log")], stdout=subprocess.PIPE, env=environment, start_new_session=True
    ) as parent:
        try:
            assert parent.stdout is not None
            pid, url = parent.stdout.readline().decode().split()
            assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
            os.kill(parent.pid, signal.SIGKILL)
            assert gone(int(pid), 10)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def test_a_server_that_cannot_start_says_why(bm25_directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "0", "contents": "x"}\n')
    server = EmbeddedServer(bm25_directory, other, log_path=tmp_path / "log")
    with pytest.raises(EmbeddedServerError, match=r"(?s)ended with code 2.*was built from a corpus"):
        server.start()
    with pytest.raises(EmbeddedServerError, match="is not running"):
        _ = server.pid


def test_a_server_that_is_not_ready_in_time_is_stopped(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    server = EmbeddedServer(bm25_directory, corpus_path, log_path=tmp_path / "log", startup_timeout_s=0.05)
    with pytest.raises(EmbeddedServerError, match=r"was not ready after 0\.05 s"):
        server.start()
    with pytest.raises(EmbeddedServerError, match="is not running"):
        _ = server.pid


def restarted(server: EmbeddedServer, times: int) -> bool:
    """Wait until it was started again that often and answers."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if server.restarts == times and httpx.get(f"{server.url}/health", trust_env=False).is_success:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    return False


def test_kill_9_while_queries_are_in_flight_costs_no_search(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with EmbeddedServer(bm25_directory, corpus_path, log_path=log) as server:
        url, pid = server.url, server.pid

        async def scenario() -> None:
            retriever = HttpRetriever([url], timeout_s=10, deadline_s=60)

            async def episode(number: int) -> None:
                for turn in range(60):
                    found = await retriever.search(f"noble gas {number} {turn}", 1)
                    assert [document.id for document in found] == ["d31"]

            async def killer() -> None:
                await asyncio.sleep(0.1)
                os.kill(pid, signal.SIGKILL)

            await asyncio.gather(killer(), *(episode(number) for number in range(64)))
            await retriever.aclose()

        asyncio.run(scenario())
        assert restarted(server, 1)
        assert server.url == url
        assert server.pid != pid
        assert f"ended with code -9; restart 1 on port {url.rpartition(':')[2]}" in log.read_text()
    time.sleep(0.3)
    assert log.read_text().count("serving on port") == 2  # not a third time after stop()


def test_a_server_that_keeps_dying_is_given_up(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    with EmbeddedServer(bm25_directory, corpus_path, log_path=tmp_path / "log") as server:
        for times in range(1, 4):
            os.kill(server.pid, signal.SIGKILL)
            assert restarted(server, times)
        pid = server.pid
        os.kill(pid, signal.SIGKILL)
        assert gone(pid, 5)
        time.sleep(0.2)
        with pytest.raises(
            EmbeddedServerError, match=r"(?s)died \(code -9\) once more after 3 restarts.*log"
        ):
            _ = server.url
        assert server.restarts == 3
    with pytest.raises(EmbeddedServerError, match="is not running"):
        _ = server.url


def test_stopping_it_while_it_restarts_leaves_nothing(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    server = EmbeddedServer(bm25_directory, corpus_path, log_path=tmp_path / "log")
    server.start()
    first = server.pid
    os.kill(first, signal.SIGKILL)
    while server.pid == first:
        time.sleep(0.001)
    second = server.pid
    server.stop()
    assert not alive(first)
    assert not alive(second)
    server.start()  # and it can be used again
    assert httpx.get(f"{server.url}/health", trust_env=False).is_success
    server.stop()


def test_a_token_for_servers_elsewhere_does_not_lock_this_one(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "for another server")
    with EmbeddedServer(bm25_directory, corpus_path, log_path=tmp_path / "log") as server:
        answer = httpx.post(f"{server.url}/retrieve", json={"query": "tea"}, trust_env=False)
        assert answer.status_code == 200
