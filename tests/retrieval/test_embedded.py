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

from searchrl.retrieval.client import HttpRetriever
from searchrl.retrieval.embedded import EmbeddedServer, EmbeddedServerError

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
