"""The search server: ``python -m searchrl.retrieval.server --index DIR --corpus FILE``.

``POST /retrieve`` answers in the format of `wire`; ``GET /health`` tells what is served. Bad input gets
a 4xx, a full queue 503 with Retry-After, both with ``{"error": reason}``; neither disturbs other requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Before numpy, torch and faiss are imported: spinning OpenMP threads starve whatever shares the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from searchrl.retrieval.batching import MicroBatcher, QueueFullError, SearchFailedError
from searchrl.retrieval.types import Hit, Index
from searchrl.retrieval.wire import MAX_BODY_BYTES, BadRequestError, parse_request, render_answer

if TYPE_CHECKING:
    from searchrl.retrieval.corpus import Corpus

BODY_TIMEOUT_S = 10.0
_GRACE_S = 5.0


@dataclass(kw_only=True, slots=True, frozen=True)
class Service:
    """What a server serves."""

    index: Index
    corpus: Corpus
    fingerprint: str
    """Of the index's manifest."""
    shuffle_seed: int | None = None
    """If set, each found row is replaced by another, always the same one: the ablation "shuffled documents",
    in which documents are real but have nothing to do with the query."""


def create_app(service: Service, *, max_queue: int = 4096) -> Starlette:
    """Return the ASGI application. ``max_queue`` bounds the distinct queries waiting for the index."""
    replacement = _replacement(len(service.corpus), service.shuffle_seed)
    batcher = MicroBatcher(service.index.search, service.fingerprint, max_queue=max_queue)

    def splice(hits: list[Hit]) -> list[tuple[bytes, float]]:
        return [(service.corpus.raw(replacement(hit.row)), hit.score) for hit in hits]

    async def retrieve(request: Request) -> Response:
        try:
            wanted = parse_request(await _body(request))
            found = await batcher.submit(wanted.queries, wanted.top_k)
        except BadRequestError as error:
            return JSONResponse({"error": str(error)}, status_code=error.status)
        except QueueFullError as error:
            return JSONResponse({"error": str(error)}, status_code=503, headers={"Retry-After": "1"})
        except SearchFailedError as error:
            return JSONResponse({"error": str(error)}, status_code=500)
        body = render_answer([splice(hits) for hits in found], return_scores=wanted.return_scores)
        return Response(body, media_type="application/json")

    async def health(_: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "index": service.fingerprint,
                "rows": len(service.corpus),
                "shuffle_seed": service.shuffle_seed,
            }
        )

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        batcher.close()

    return Starlette(
        routes=[Route("/retrieve", retrieve, methods=["POST"]), Route("/health", health)],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def _body(request: Request) -> bytes:
    """Read the body up to the limit, and not for ever."""
    too_large = BadRequestError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413)
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError as error:
        raise BadRequestError(f"the body did not arrive in {BODY_TIMEOUT_S:g} s", status=408) from error
    except ClientDisconnect as error:
        raise BadRequestError("the client left before its body arrived") from error
    return bytes(body)


def _replacement(rows: int, seed: int | None) -> Callable[[int], int]:
    """Return the map from a found row to the one that is shown: itself, or its successor in a seeded cycle.

    A cycle through all rows is a permutation without fixed points: no document stands in for itself.
    """
    if seed is None:
        return lambda row: row
    import numpy as np

    order = np.random.default_rng(seed).permutation(rows)
    successor = np.empty(rows, dtype=np.int64)
    successor[order] = np.roll(order, -1)
    return lambda row: int(successor[row])


class _Server(uvicorn.Server):
    """A uvicorn server that can be asked to stop from any thread."""

    def stop(self) -> None:
        """End gracefully, or by force if that takes too long."""
        if not self.started:
            os._exit(0)
        self.should_exit = True
        time.sleep(2 * _GRACE_S)
        os._exit(1)


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


async def _serve(server: _Server, listener: socket.socket, ready_file: Path | None) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    port = listener.getsockname()[1]
    if server.started:
        print(f"serving on port {port}", flush=True)
        if ready_file is not None:
            temporary = ready_file.with_name(f"{ready_file.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"port": port, "pid": os.getpid()}))
            temporary.replace(ready_file)
    await serving


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="searchrl.retrieval.server", description="Serve an index over HTTP."
    )
    parser.add_argument("--index", type=Path, required=True, help="folder made by build_index")
    parser.add_argument("--corpus", type=Path, required=True, help="the JSONL file it was built from")
    parser.add_argument("--encoder", type=Path, help="encoder folder, if it has moved since the build")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--ready-file", type=Path, help="gets {port, pid} as JSON once requests are served")
    parser.add_argument("--shuffle-seed", type=int, help="ablation: return unrelated documents")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when standard input closes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Load an index, warm it up, serve it until SIGTERM (or the parent's death)."""
    args = _arguments(argv)
    server: _Server | None = None

    def on_death() -> None:
        if server is None:
            os._exit(0)
        server.stop()

    if args.exit_with_parent:
        threading.Thread(target=_watch_parent, args=(on_death,), daemon=True).start()
    from searchrl.retrieval.build import load_index, read_manifest
    from searchrl.retrieval.corpus import Corpus

    corpus = Corpus(args.corpus)
    index = load_index(args.index, corpus, encoder_path=args.encoder)
    index.search(["warm up"], 1)
    service = Service(
        index=index,
        corpus=corpus,
        fingerprint=read_manifest(args.index).fingerprint,
        shuffle_seed=args.shuffle_seed,
    )
    listener = socket.create_server((args.host, args.port), backlog=1024)
    config = uvicorn.Config(
        create_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=int(_GRACE_S)
    )
    server = _Server(config)
    # After its own graceful end uvicorn raises SIGTERM again for the handler that was there before it.
    signal.signal(signal.SIGTERM, server.handle_exit)
    asyncio.run(_serve(server, listener, args.ready_file))


if __name__ == "__main__":
    main()
