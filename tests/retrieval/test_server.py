"""The server's process: how it starts, ends, and bears what clients do to it."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
import uvicorn

from retrieval.processes import MODULE, environment, serving
from searchrl.retrieval.app import Service, create_app
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.loading import load_index
from searchrl.retrieval.server import ServerError, argument_parser, bind, main
from searchrl.retrieval.wire import TOKEN_VARIABLE

pytestmark = pytest.mark.integration

# One query a time, so that a few thousand take a while.
SLOW = ("--max-batch", "1", "--cache-size", "0", "--no-deduplicate")
SHORT_GRACE = (
    "-c",
    "import sys, searchrl.retrieval.server as server; server.GRACE_S = 0.5; server.main(sys.argv[1:])",
)
QUERIES = [f"capital river mountain planet {i}" for i in range(2000)]


async def queued(client: httpx.AsyncClient) -> None:
    """Return once the server has a queue."""
    async with asyncio.timeout(10):
        while (await client.get("/health")).json()["queue"] == 0:
            await asyncio.sleep(0.01)


def test_sigterm_while_busy_answers_everyone_and_ends_well(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    with serving(bm25_directory, corpus_path, tmp_path, *SLOW) as server:

        async def scenario() -> None:
            async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30) as client:
                tasks = [
                    asyncio.create_task(client.post("/retrieve", json={"queries": QUERIES})) for _ in range(3)
                ]
                await queued(client)
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
                assert not all(task.done() for task in tasks)  # it was busy indeed
                with pytest.raises(httpx.ConnectError):
                    async with httpx.AsyncClient(trust_env=False) as late:
                        await late.get(f"{server.url}/health")
                answers = await asyncio.gather(*tasks)
            assert [answer.status_code for answer in answers] == [200] * 3
            assert all(len(answer.json()["result"]) == len(QUERIES) for answer in answers)

        asyncio.run(scenario())
        assert server.process.wait(10) == 0
        assert "force" not in server.log.read_text()


@pytest.mark.parametrize("signals", [[signal.SIGTERM, signal.SIGINT], [signal.SIGINT, signal.SIGTERM]])
def test_a_second_signal_ends_it_at_once(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path, signals: list[signal.Signals]
) -> None:
    with serving(bm25_directory, corpus_path, tmp_path, *SLOW) as server:

        async def scenario() -> None:
            async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30) as client:
                task = asyncio.create_task(client.post("/retrieve", json={"queries": QUERIES * 2}))
                await queued(client)
                server.process.send_signal(signals[0])
                await asyncio.sleep(0.2)
                assert server.process.poll() is None
                server.process.send_signal(signals[1])
                with pytest.raises(httpx.TransportError):
                    await task

        asyncio.run(scenario())
        assert server.process.wait(1) == 128 + signals[1]
        assert "a second signal" in server.log.read_text()


def test_a_server_that_cannot_finish_in_time_ends_by_force(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    with (
        serving(bm25_directory, corpus_path, tmp_path, code=SHORT_GRACE) as server,
        socket.create_connection(("127.0.0.1", server.port)) as stalled,
    ):
        stalled.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        time.sleep(0.1)
        server.process.terminate()
        assert server.process.wait(5) == 1
        assert "not finished within 0.5 s" in server.log.read_text()


def test_an_idle_server_ends_at_once_even_with_connections_kept_alive(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    with (
        serving(bm25_directory, corpus_path, tmp_path) as server,
        httpx.Client(base_url=server.url, trust_env=False) as client,
    ):
        assert client.get("/health").status_code == 200
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(2) == 0
        log = server.log.read_text()
    assert log.count("\n") == 1, log
    assert log.startswith(f"serving on port {server.port}: 50 passages, index ")


def failed_start(
    *flags: str, code: tuple[str, ...] = MODULE, variables: Mapping[str, str] | None = None
) -> str:
    """The one line that a server which must not start leaves on stderr."""
    result = subprocess.run(
        [sys.executable, *code, *flags],
        capture_output=True,
        text=True,
        timeout=30,
        env=environment(variables),
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("searchrl serve: ")
    return lines[0].removeprefix("searchrl serve: ")


def test_what_keeps_it_from_starting_is_one_line(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "0", "contents": "x"}\n')
    index, corpus = ["--index", str(bm25_directory)], ["--corpus", str(corpus_path)]
    free = ["--port", "0"]
    assert failed_start("--index", "/nowhere", *corpus, *free).startswith("no index at /nowhere")
    assert failed_start(*index, "--corpus", "/nowhere", *free) == (
        "no corpus at /nowhere; name the JSONL file of passages"
    )
    assert "was built from a corpus" in failed_start(*index, "--corpus", str(other), *free)
    assert "must be printable ASCII" in failed_start(*index, *corpus, *free, variables={TOKEN_VARIABLE: ""})
    assert "cannot listen on nowhere.invalid" in failed_start(*index, *corpus, "--host", "nowhere.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for code in (MODULE, ("-m", "searchrl.cli", "serve")):
            line = failed_start(*index, *corpus, "--port", port, code=code)
            assert line == (
                f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --port "
                "(0: any free one), or end what listens there"
            )
    assert failed_start(*index, *corpus, "--port", "0", "--devices", "gpu") == (
        "devices [gpu] are neither the CPU alone nor GPUs alone: write cpu, or cuda:0, cuda:1"
    )


def test_a_server_for_everyone_without_a_token_warns(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    host = ("--host", "0.0.0.0")
    with serving(bm25_directory, corpus_path, tmp_path, *host) as server:
        assert "WARNING: other machines can reach 0.0.0.0" in server.log.read_text()
        assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 200
    with serving(bm25_directory, corpus_path, tmp_path, *host, variables={TOKEN_VARIABLE: "t"}) as server:
        assert "WARNING" not in server.log.read_text()
        assert httpx.post(f"{server.url}/retrieve", json={}, trust_env=False).status_code == 401


def test_vllms_metrics_folder_is_none_of_its_business(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vllm"
    folder.mkdir()
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with serving(bm25_directory, corpus_path, tmp_path, variables=variables) as server:
        assert httpx.get(f"{server.url}/metrics", trust_env=False).status_code == 200
        assert not list(folder.iterdir())


def test_2000_concurrent_requests_are_all_answered(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    with serving(bm25_directory, corpus_path, tmp_path) as server:

        async def ask(number: int, connected: asyncio.Barrier) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            await connected.wait()
            body = json.dumps({"query": f"noble gas {number}"}).encode()
            writer.write(
                b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            assert json.loads(await reader.readexactly(length))["result"][0][0]["id"] == "d31"
            writer.close()
            await writer.wait_closed()

        async def scenario() -> None:
            connected = asyncio.Barrier(2000)
            async with asyncio.timeout(30):
                await asyncio.gather(*(ask(number, connected) for number in range(2000)))

        try:
            asyncio.run(scenario())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def slow_reader(port: int, *, times: int = 1) -> socket.socket:
    """A client that asks for megabytes (``times`` on one connection) and does not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    body = json.dumps({"queries": ["capital country river"] * 800, "topk": 20}).encode()
    head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
    client.sendall((times - 1) * (head + b"\r\n" + body) + head + b"Connection: close\r\n\r\n" + body)
    return client


def test_slow_readers_and_stalled_senders_hold_up_nobody_else(
    bm25_directory: Path, corpus_path: Path, tmp_path: Path
) -> None:
    with (
        serving(bm25_directory, corpus_path, tmp_path) as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=2) as client,
        socket.create_connection(("127.0.0.1", server.port)) as stalled,
    ):
        stalled.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        readers = [slow_reader(server.port) for _ in range(20)]
        for number in range(50):
            assert client.post("/retrieve", json={"query": f"tea {number}"}).status_code == 200
        answer = b""
        while chunk := readers[0].recv(1 << 20):
            answer += chunk
        assert len(answer) > 1 << 20
        assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["result"]) == 800
        for reader in readers:
            reader.close()
        assert client.get("/health").json()["queue"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
def test_a_client_that_never_reads_its_answer_loses_the_connection(
    bm25_directory: Path, corpus_path: Path
) -> None:
    corpus = Corpus(corpus_path)
    app = create_app(Service(index=load_index(bm25_directory, corpus), corpus=corpus, fingerprint="f"))
    listener = bind("127.0.0.1", 0, stalled_reader_s=1)
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        with slow_reader(port, times=8):  # more than the kernel's buffers hold
            time.sleep(0.5)
            assert len(server.server_state.connections) == 1
            deadline = time.monotonic() + 10
            while server.server_state.connections and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not server.server_state.connections
    finally:
        server.should_exit = True
        thread.join(10)


def test_an_address_that_cannot_be_had_is_a_typed_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ServerError, match="already in use"):
        bind("127.0.0.1", taken.getsockname()[1])
    with bind("::1", 0) if socket.has_ipv6 else bind("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0


def test_devices_come_as_a_list() -> None:
    flags = ["--index", "i", "--corpus", "c"]
    assert argument_parser().parse_args(flags).devices == ("cpu",)
    assert argument_parser().parse_args([*flags, "--devices", "cuda:0,cuda:1"]).devices == (
        "cuda:0",
        "cuda:1",
    )


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--port", "65536", "expected a whole number from 0 to 65535, got '65536'"),
        ("--max-batch", "0", "expected a whole number from 1"),
        ("--max-queue", "many", "expected a whole number from 1"),
        ("--cache-size", "-1", "expected a whole number from 0"),
    ],
)
def test_flags_that_cannot_work_are_refused(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, reason: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--index", "i", "--corpus", "c", f"{flag}={value}"])
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err
