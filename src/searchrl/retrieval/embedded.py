"""A search server of one's own: a process that starts with a ``with`` block and never outlives its parent."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from searchrl.errors import SearchrlError
from searchrl.retrieval.wire import TOKEN_VARIABLE

_LOG_TAIL = 2000
_STOP_TIMEOUT_S = 15.0
_MAX_RESTARTS = 3
_RESTART_WINDOW_S = 300.0


class EmbeddedServerError(SearchrlError, RuntimeError):
    """The server died or did not come up in time; the message ends with its log's tail."""


class EmbeddedServer:
    """Serves an index on a free loopback port while the ``with`` block runs.

    The process is a child with a pipe as standard input: when this process dies, even by kill -9, the pipe
    closes and the server ends. If the server dies instead (out of memory, kill -9), a thread starts it again
    on the same port, so that clients that try again succeed. At the fourth death within 5 minutes it gives
    up: ``url`` and ``pid`` then raise the reason.

    ``devices`` are where encoder and dense index compute (default: the CPU). The server's output goes to
    ``log_path``. ``startup_timeout_s`` covers opening the index and warming up. Raises `EmbeddedServerError`
    if it does not come up.
    """

    def __init__(
        self,
        index: str | Path,
        corpus: str | Path,
        *,
        log_path: str | Path,
        encoder_path: Path | None = None,
        devices: Sequence[str] = ("cpu",),
        shuffle_seed: int | None = None,
        startup_timeout_s: float = 600.0,
    ) -> None:
        self._arguments = ["--index", str(index), "--corpus", str(corpus), "--exit-with-parent"]
        self._arguments += ["--devices", ",".join(devices)]
        if encoder_path is not None:
            self._arguments += ["--encoder", str(encoder_path)]
        if shuffle_seed is not None:
            self._arguments += ["--shuffle-seed", str(shuffle_seed)]
        self._log_path = Path(log_path)
        self._startup_timeout_s = startup_timeout_s
        self._lock = threading.Lock()  # held to start or end a process, so that none starts after stop()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: threading.Thread | None = None
        self._port = 0
        self._restarts = 0
        self._failure = "is not running"

    @property
    def url(self) -> str:
        """Base URL, ``http://127.0.0.1:<port>``; raises `EmbeddedServerError` unless it is running."""
        self._require()
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Process id of the server; raises `EmbeddedServerError` unless it is running."""
        return self._require().pid

    @property
    def restarts(self) -> int:
        """How often the server died and was started again."""
        return self._restarts

    def __enter__(self) -> Self:
        """Start the server and wait until it answers."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self.stop()

    def start(self) -> None:
        """Start the process; return once ``/health`` answers."""
        if self._process is not None:
            raise EmbeddedServerError("the embedded search server is already running")
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._stopping.clear()
        try:
            self._port = self._launch(port=0)
        except BaseException:  # Ctrl-C too must leave no process behind
            self.stop()
            raise
        self._monitor = threading.Thread(target=self._watch, name="retrieval-monitor", daemon=True)
        self._monitor.start()

    def stop(self) -> None:
        """End the process: SIGTERM, then after a while SIGKILL. Does nothing if it is not running."""
        self._stopping.set()
        with self._lock:
            process = self._process
            if process is not None:
                _end(process)
        if self._monitor is not None:
            self._monitor.join()
        self._process, self._monitor, self._failure = None, None, "is not running"

    def _require(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EmbeddedServerError(f"the embedded search server {self._failure}")
        return self._process

    def _watch(self) -> None:
        """Start the server again whenever it dies, until `stop` or too many deaths."""
        deaths: deque[float] = deque(maxlen=_MAX_RESTARTS)
        while (process := self._process) is not None:
            code = process.wait()
            if self._stopping.is_set():
                return
            if process.stdin is not None:
                process.stdin.close()
            now = time.monotonic()
            if len(deaths) == _MAX_RESTARTS and now - deaths[0] < _RESTART_WINDOW_S:
                self._failure = (
                    f"died (code {code}) once more after {_MAX_RESTARTS} restarts within "
                    f"{_RESTART_WINDOW_S:g} s; {self._log_tail()}"
                )
                self._process = None
                self._say("giving up: too many deaths")
                return
            deaths.append(now)
            self._restarts += 1
            self._say(f"the server ended with code {code}; restart {self._restarts} on port {self._port}")
            # If it does not come up it is dead, and the next round counts that.
            with contextlib.suppress(EmbeddedServerError):
                self._launch(port=self._port)

    def _launch(self, *, port: int) -> int:
        """Start a process; return its port once it answers."""
        source = str(Path(__file__).resolve().parents[2])
        paths = [source, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        environment.pop(TOKEN_VARIABLE, None)  # meant for servers elsewhere; this one is reached by loopback
        with tempfile.TemporaryDirectory(prefix="searchrl-") as folder:
            ready_file = Path(folder) / "ready.json"
            command = [sys.executable, "-m", "searchrl.retrieval.server", *self._arguments]
            with self._lock, self._log_path.open("ab") as log:
                if self._stopping.is_set():
                    raise EmbeddedServerError("the embedded search server is being stopped")
                process = self._process = subprocess.Popen(
                    [*command, "--port", str(port), "--ready-file", str(ready_file)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    # Out of the terminal's group: Ctrl-C must not take it before the trainer's last search.
                    start_new_session=True,
                )
            return self._wait(process, ready_file)

    def _wait(self, process: subprocess.Popen[bytes], ready_file: Path) -> int:
        """Return the port once the server answers; end it if it does not in time."""
        deadline = time.monotonic() + self._startup_timeout_s
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise EmbeddedServerError(
                    f"the search server ended with code {process.returncode}; {self._log_tail()}"
                )
            if ready_file.exists():
                port = int(json.loads(ready_file.read_text())["port"])
                # It may die between its ready file and this request: the next round tells.
                with contextlib.suppress(httpx.TransportError):
                    url = f"http://127.0.0.1:{port}/health"
                    if httpx.get(url, timeout=10.0, trust_env=False).status_code == 200:
                        return port
            time.sleep(0.02)
        _end(process)
        raise EmbeddedServerError(
            f"the search server was not ready after {self._startup_timeout_s:g} s; {self._log_tail()}"
        )

    def _say(self, line: str) -> None:
        with self._log_path.open("a") as log:
            log.write(f"[embedded] {line}\n")

    def _log_tail(self) -> str:
        text = self._log_path.read_text(errors="replace")[-_LOG_TAIL:].strip()
        return f"the end of its log {self._log_path}:\n{text or '(empty)'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, then make it; does nothing more if it has."""
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
