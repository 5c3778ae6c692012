"""Real search server processes for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MODULE = ("-m", "searchrl.retrieval.server")


@dataclass(kw_only=True, slots=True, frozen=True)
class Running:
    """A server that answers."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def resident_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with ``variables``, for a process that finds the package."""
    source = str(Path(__file__).parents[2] / "src")
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **(variables or {})}


def listening_on(pid: int) -> set[str]:
    """The addresses on which a process takes connections, as the kernel writes them: loopback is 0100007F."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
                addresses.add(fields[1].partition(":")[0])
    return addresses


@contextmanager
def serving(
    index: Path,
    corpus: Path,
    folder: Path,
    *flags: str,
    code: tuple[str, ...] = MODULE,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Run a server on a free port; ``code`` is what Python runs. Killed at the end if it still runs."""
    ready, log = folder / "ready.json", folder / "log"
    ready.unlink(missing_ok=True)
    command = [sys.executable, *code, "--index", str(index), "--corpus", str(corpus), "--port", "0"]
    command += ["--ready-file", str(ready), "--exit-with-parent", *flags]
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment(variables)
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 30
            while not ready.exists():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            yield Running(process=process, port=json.loads(ready.read_text())["port"], log=log)
        finally:
            process.kill()
