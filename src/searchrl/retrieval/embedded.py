"""A search server of one's own: a process that starts with a ``with`` block and never outlives its parent."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from searchrl.errors import SearchrlError

_LOG_TAIL = 2000
_STOP_TIMEOUT_S = 15.0


class EmbeddedServerError(SearchrlError, RuntimeError):
    """The server died or did not come up in time; the message ends with its log's tail."""


class EmbeddedServer:
    """Serves an index on a free loopback port while the ``with`` block runs.

    The process is a child with a pipe as standard input: when this process dies, even by kill -9, the pipe
    closes and the server ends. Its output goes to ``log_path``. ``startup_timeout_s`` covers opening the
    index and warming up. Raises `EmbeddedServerError` if it does not come up.
    """

    def __init__(
        self,
        index: str | Path,
        corpus: str | Path,
        *,
        log_path: str | Path,
        encoder_path: Path | None = None,
        shuffle_seed: int | None = None,
        startup_timeout_s: float = 120.0,
    ) -> None:
        self._arguments = ["--index", str(index), "--corpus", str(corpus), "--exit-with-parent"]
        if encoder_path is not None:
            self._arguments += ["--encoder", str(encoder_path)]
        if shuffle_seed is not None:
            self._arguments += ["--shuffle-seed", str(shuffle_seed)]
        self._log_path = Path(log_path)
        self._startup_timeout_s = startup_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """Base URL, ``http://127.0.0.1:<port>``; raises `EmbeddedServerError` unless it is running."""
        if not self._url:
            raise EmbeddedServerError("the embedded search server is not running")
        return self._url

    @property
    def pid(self) -> int:
        """Process id of the server; raises `EmbeddedServerError` unless it is running."""
        if self._process is None:
            raise EmbeddedServerError("the embedded search server is not running")
        return self._process.pid

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
        with tempfile.TemporaryDirectory(prefix="searchrl-") as folder, self._log_path.open("ab") as log:
            ready_file = Path(folder) / "ready.json"
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "searchrl.retrieval.server",
                    *self._arguments,
                    "--ready-file",
                    str(ready_file),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                # Out of the terminal's group: Ctrl-C must not take it before the trainer's last search.
                start_new_session=True,
            )
            try:
                self._url = self._wait(self._process, ready_file)
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """End the process: SIGTERM, then after a while SIGKILL. Does nothing if it is not running."""
        process, self._process, self._url = self._process, None, ""
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def _wait(self, process: subprocess.Popen[bytes], ready_file: Path) -> str:
        """Return the URL once the server answers."""
        deadline = time.monotonic() + self._startup_timeout_s
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise EmbeddedServerError(
                    f"the search server ended with code {process.returncode}; {self._log_tail()}"
                )
            if ready_file.exists():
                url = f"http://127.0.0.1:{json.loads(ready_file.read_text())['port']}"
                # It may die between its ready file and this request: the next round tells.
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health", timeout=10.0, trust_env=False).status_code == 200:
                        return url
            time.sleep(0.02)
        raise EmbeddedServerError(
            f"the search server was not ready after {self._startup_timeout_s:g} s; {self._log_tail()}"
        )

    def _log_tail(self) -> str:
        text = self._log_path.read_text(errors="replace")[-_LOG_TAIL:].strip()
        return f"the end of its log {self._log_path}:\n{text or '(empty)'}"
