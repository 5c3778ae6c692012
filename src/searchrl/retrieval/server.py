"""The search server's process: ``searchrl serve``, or ``python -m searchrl.retrieval.server``.

The first SIGTERM or SIGINT stops accepting, answers what was asked and ends with code 0; a second one, or 10
seconds, ends it at once with another code. What keeps it from starting is one line on stderr and code 2.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

# Before numpy, torch and faiss are imported: spinning OpenMP threads starve whatever shares the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before prometheus_client is imported: vLLM sets it in the trainer, and this process would write its metrics
# among that one's files.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

import uvicorn
from starlette.applications import Starlette

from searchrl.errors import SearchrlError
from searchrl.retrieval.app import Service, create_app
from searchrl.retrieval.wire import TOKEN_VARIABLE, is_token

GRACE_S = 10.0
"""Seconds between the wish to stop and the end by force."""
_KEEP_ALIVE_S = 75
_STALLED_READER_S = 60
_BACKLOG = 4096
_MAX_FILES = 65536


class ServerError(SearchrlError, RuntimeError):
    """The server cannot start as it was asked to."""


def main(argv: Sequence[str] | None = None) -> None:
    """Load an index, warm it up, serve it until SIGTERM, SIGINT or the parent's death."""
    args = argument_parser().parse_args(argv)
    # Until requests are served Ctrl-C ends it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _run(args)
    except SearchrlError as error:
        print(f"searchrl serve: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _run(args: argparse.Namespace) -> None:
    server: _Server | None = None

    def on_parents_death() -> None:
        if server is None:
            os._exit(0)
        server.stop()

    if args.exit_with_parent:
        threading.Thread(target=_watch_parent, args=(on_parents_death,), daemon=True).start()
    token = _token()
    # Bound before a minute of loading: a port in use is known at once. Nobody can connect until it listens.
    with bind(args.host, args.port) as listener:
        if token is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            print(
                f"searchrl serve: WARNING: other machines can reach {args.host} and there is no token: "
                f"anyone may search. Set {TOKEN_VARIABLE}, or leave --host at 127.0.0.1.",
                file=sys.stderr,
            )
        service = _load(args)
        app = create_app(
            service,
            max_queue=args.max_queue,
            max_batch=args.max_batch,
            cache_size=args.cache_size,
            deduplicate=args.deduplicate,
            token=token,
        )
        server = _Server(app, listener, args.ready_file)
        _allow_many_connections()
        server.run_until_stopped(
            f"serving on port {listener.getsockname()[1]}: {len(service.corpus)} passages, "
            f"index {service.identity}, at http://{args.host}:{listener.getsockname()[1]}/retrieve"
        )


def bind(host: str, port: int, *, stalled_reader_s: int = _STALLED_READER_S) -> socket.socket:
    """Return a bound TCP socket that does not listen yet.

    A client that takes nothing of its answer for ``stalled_reader_s`` seconds loses its connection, so that
    answers nobody reads do not pile up in memory. Raises `ServerError` if the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sys.platform == "linux":  # inherited by the accepted connections
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * stalled_reader_s)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ServerError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port (0: any "
            "free one), or end what listens there"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """A uvicorn server that ends within `GRACE_S` once asked to, with code 0 only if nobody was cut off."""

    def __init__(self, app: Starlette, listener: socket.socket, ready_file: Path | None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
            )
        )
        self._listener = listener
        self._ready_file = ready_file

    def run_until_stopped(self, greeting: str) -> None:
        """Serve; print ``greeting`` and write the ready file once requests are answered."""
        try:
            asyncio.run(self._until_stopped(greeting))
        except OSError as error:  # another process listens since this one bound the port
            raise ServerError(f"cannot listen: {error.strerror or error}") from error

    def stop(self) -> None:
        """End gracefully, or by force if that takes too long. May be called from any thread."""
        self.should_exit = True
        watchdog = threading.Timer(GRACE_S, _leave, args=(1, f"not finished within {GRACE_S:g} s"))
        watchdog.daemon = True
        watchdog.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT; uvicorn's own handler would raise the signal again after the end."""
        if self.should_exit:
            _leave(128 + sig, "a second signal")
        self.stop()

    async def _until_stopped(self, greeting: str) -> None:
        serving = asyncio.create_task(self.serve(sockets=[self._listener]))
        while not (self.started or serving.done()):
            await asyncio.sleep(0.01)
        if self.started:
            print(greeting, flush=True)
            if self._ready_file is not None:
                temporary = self._ready_file.with_name(f"{self._ready_file.name}.{os.getpid()}.tmp")
                port = self._listener.getsockname()[1]
                temporary.write_text(json.dumps({"port": port, "pid": os.getpid()}))
                temporary.replace(self._ready_file)
        await serving


def _leave(code: int, reason: str) -> None:
    """End this process without waiting for anything."""
    print(f"searchrl serve: stopped by force: {reason}", file=sys.stderr, flush=True)
    os._exit(code)


def _load(args: argparse.Namespace) -> Service:
    """Open corpus and index, and search once: the first search loads what is loaded lazily."""
    from searchrl.retrieval.corpus import Corpus
    from searchrl.retrieval.loading import load_index
    from searchrl.retrieval.manifest import read_manifest

    corpus = Corpus(args.corpus)
    index = load_index(args.index, corpus, encoder_path=args.encoder, devices=args.devices)
    index.search(["warm up"], 1)
    return Service(
        index=index,
        corpus=corpus,
        fingerprint=read_manifest(args.index).fingerprint,
        shuffle_seed=args.shuffle_seed,
    )


def _token() -> str | None:
    """Return the bearer token from the environment; on the command line every user of the machine sees it."""
    token = os.environ.get(TOKEN_VARIABLE)
    if token is not None and not is_token(token):
        raise ServerError(
            f"{TOKEN_VARIABLE} must be printable ASCII without spaces, and not empty: or unset it"
        )
    return token


def _allow_many_connections() -> None:
    """Raise the soft limit of open files; its usual 1024 is less than a large run's connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _watch_parent(on_death: Callable[[], None]) -> None:
    """Call ``on_death`` once the parent is gone: its end of standard input closed, or this process orphaned.

    The second catches a pipe that lives on in another child which the parent forked.
    """
    parent = os.getppid()
    while os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], 1.0)
        if readable and not os.read(0, 4096):
            break
    on_death()


def argument_parser() -> argparse.ArgumentParser:
    """All flags of ``searchrl serve``."""
    parser = argparse.ArgumentParser(
        prog="searchrl serve",
        description="Serve an index over HTTP: POST /retrieve, GET /health, GET /metrics (Prometheus).",
        epilog=f"If {TOKEN_VARIABLE} is set, /retrieve needs it as a bearer token. "
        "--max-batch 1 --cache-size 0 --no-deduplicate answers one query at a time, for comparisons.",
    )
    parser.add_argument("--index", type=Path, required=True, help="folder of the index")
    parser.add_argument("--corpus", type=Path, required=True, help="the JSONL file it was built from")
    parser.add_argument("--encoder", type=Path, help="encoder folder, if it has moved since the build")
    parser.add_argument(
        "--devices",
        type=lambda text: tuple(text.split(",")),
        default=("cpu",),
        help="where encoder and dense index compute: cpu (default), cuda:0, or several: cuda:0,cuda:1",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=_whole(0, 65535), default=8000, help="0 picks a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--max-queue",
        type=_whole(1),
        default=8192,
        help="distinct queries that may wait; more get 503. Lower it to fail sooner (default: %(default)s)",
    )
    parser.add_argument(
        "--max-batch",
        type=_whole(1),
        default=128,
        help="queries computed together; raise it on a GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--cache-size",
        type=_whole(0),
        default=32768,
        help="answers remembered, 256 MiB at most; 0 remembers none (default: %(default)s)",
    )
    parser.add_argument(
        "--no-deduplicate",
        dest="deduplicate",
        action="store_false",
        help="compute equal queries that wait at the same time one by one",
    )
    parser.add_argument("--shuffle-seed", type=int, help="ablation: return unrelated documents")
    parser.add_argument("--ready-file", type=Path, help="gets {port, pid} as JSON once requests are served")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when standard input closes")
    return parser


def _whole(lowest: int, highest: int = 10**8) -> Callable[[str], int]:
    """Return a parser of whole numbers in these bounds."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and lowest <= int(text) <= highest):
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {lowest} to {highest}, got {text!r}"
            )
        return int(text)

    return parse


if __name__ == "__main__":
    main()
