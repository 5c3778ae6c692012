"""`searchrl report --watch`: the page on loopback, kept up to date while the run goes on."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from searchrl.report.errors import ReportError
from searchrl.report.page import page, payload, title
from searchrl.report.rundir import RunReader

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOST = "127.0.0.1"


class LiveReport:
    """The newest state of the runs. A page asks every other second whether there is a newer one."""

    def __init__(self, readers: Sequence[RunReader]) -> None:
        self._readers = readers
        self._lock = threading.Lock()  # pages ask at the same time, and reading takes a while
        self._version = 0
        self._data = b""
        self._chunks: dict[str, bytes] = {}
        self._earlier: dict[str, bytes] = {}

    def newer_than(self, version: int) -> bytes | None:
        """The state as JSON, with its ``version``; None if that is the one the page has."""
        with self._lock:
            changed = [reader.refresh() for reader in self._readers]
            if any(changed) or not self._data:
                self._version += 1
                self._data = json.dumps(
                    {"version": self._version, **payload(self._readers)}, allow_nan=False
                ).encode()
                # A page may still ask for what its state named.
                self._earlier, self._chunks = self._chunks, self._named_chunks()
            return self._data if version != self._version else None

    def chunk(self, name: str) -> bytes | None:
        """A chunk of the newest state or of the one before; None if there is none of that name."""
        with self._lock:
            return self._chunks.get(name) or self._earlier.get(name)

    def _named_chunks(self) -> dict[str, bytes]:
        return {
            f"{number}/{name}": chunk
            for number, reader in enumerate(self._readers)
            for name, chunk in reader.chunks.items()
        }


def make_app(readers: Sequence[RunReader]) -> Starlette:
    """The page at ``/``, its data at ``/data``, transcripts at ``/chunks/…``.

    Requests must name this host: a page of some other site, whose name was made to point here, does not.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import Response
    from starlette.routing import Route

    report = LiveReport(readers)
    shell = page(title(readers), mode="live")

    async def index(_: Request) -> Response:
        return Response(shell, media_type="text/html")

    async def data(request: Request) -> Response:
        have = request.query_params.get("have", "")
        newer = await run_in_threadpool(report.newer_than, int(have) if have.isdigit() else 0)
        return Response(status_code=204) if newer is None else Response(newer, media_type="application/json")

    async def chunk(request: Request) -> Response:
        found = report.chunk(request.path_params["name"])
        if found is None:
            return Response(status_code=404)
        return Response(found, media_type="application/json", headers={"Content-Encoding": "gzip"})

    return Starlette(
        routes=[Route("/", index), Route("/data", data), Route("/chunks/{name:path}", chunk)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


def serve(readers: Sequence[RunReader], *, port: int) -> None:
    """Serve until Ctrl-C. ``port`` 0: any that is free.

    Raises:
        ReportError: the port is taken, or may not be used.
    """
    import uvicorn

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()  # before its address is said: who comes at once waits for the server
    except (OSError, OverflowError) as error:
        listener.close()
        raise ReportError(
            f"port {port} cannot be used ({error}); choose another: --port 0 takes any"
        ) from error
    with listener:
        config = uvicorn.Config(make_app(readers), log_level="warning", timeout_graceful_shutdown=2)
        print(f"http://{HOST}:{listener.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except (
            KeyboardInterrupt
        ):  # uvicorn passes it on once it has shut down: that is how one stops watching
            print("stopped")
