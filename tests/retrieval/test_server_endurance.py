"""50,000 requests leave no file descriptor and no memory behind."""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from retrieval.clients import samples
from retrieval.processes import serving

pytestmark = pytest.mark.integration

REQUESTS = 50_000
WARM_UP = 10_000
PIPELINED = 125
DISTINCT = 7_000
"""Different queries, asked in turn: more than the cache holds, so that each is computed again each time."""
CACHE = 1_000
CONNECTIONS = 8
PER_CONNECTION = 625
ROUND = CONNECTIONS * PER_CONNECTION
GROWTH_KIB = 2 * 1024
"""40,000 requests that each kept 50 bytes would be seen."""

LENGTH = re.compile(rb"content-length: (\d+)\r\n", re.IGNORECASE)


def request(number: int) -> bytes:
    """Each query is asked twice, one request in ten is refused: every path is taken."""
    query = f"capital river {number // 2 % DISTINCT}"
    topk = 0 if number % 10 == 5 else 1 + number // 2 % 3
    body = json.dumps({"queries": [query], "topk": topk, "return_scores": True}).encode()
    return b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def ask(port: int, first: int) -> None:
    """Send `PER_CONNECTION` requests on a connection, read their answers, check each."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        ask_on(connection, first)


def ask_on(connection: socket.socket, first: int) -> None:
    answers = connection.makefile("rb", buffering=1 << 20)
    for start in range(first, first + PER_CONNECTION, PIPELINED):
        numbers = range(start, start + PIPELINED)
        connection.sendall(b"".join(map(request, numbers)))
        for number in numbers:
            status = answers.readline()
            length = 0
            while (line := answers.readline()) != b"\r\n":
                if match := LENGTH.fullmatch(line):
                    length = int(match[1])
            body = answers.read(length)
            if number % 10 == 5:
                assert status.startswith(b"HTTP/1.1 422"), status
                assert b"must be from 1 to 100" in body
            else:
                assert status.startswith(b"HTTP/1.1 200"), (status, body)
                assert body.count(b'"document"') == 1 + number // 2 % 3
    answers.close()


def test_50000_requests_leave_nothing_behind(bm25_directory: Path, corpus_path: Path, tmp_path: Path) -> None:
    with serving(bm25_directory, corpus_path, tmp_path, "--cache-size", str(CACHE)) as server:
        memory: list[int] = []
        files: list[int] = []
        for first in range(0, REQUESTS, ROUND):
            if first >= WARM_UP:
                memory.append(server.resident_kib())
                files.append(server.open_files())
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                list(
                    pool.map(
                        lambda start: ask(server.port, start), range(first, first + ROUND, PER_CONNECTION)
                    )
                )
        memory.append(server.resident_kib())
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            found = samples(client)
        files.append(server.open_files() - 1)  # the client's connection, kept alive
    prefix = "searchrl_retrieval_"
    assert found[f'{prefix}requests_total{{status="200"}}'] == 0.9 * REQUESTS
    assert found[f'{prefix}requests_total{{status="422"}}'] == 0.1 * REQUESTS
    assert found[f'{prefix}queries_total{{outcome="computed"}}'] > 0.4 * REQUESTS
    assert found[f"{prefix}cache_entries"] == CACHE
    assert max(files) - min(files) <= CONNECTIONS, files  # closed ones may linger for a moment
    assert memory[-1] - memory[0] < GROWTH_KIB, memory
