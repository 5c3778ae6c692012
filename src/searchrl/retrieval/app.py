"""The search server's ASGI application.

``POST /retrieve`` answers in the format of `wire`; ``GET /health`` tells what is served, ``GET /metrics``
what was done, for Prometheus. Whatever goes wrong is answered with ``{"error": reason}``: bad input 4xx, a
full queue 503 with Retry-After, a client's deadline 504. None of it disturbs other requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from searchrl import __version__
from searchrl.retrieval.batching import (
    DeadlineError,
    MicroBatcher,
    QueueFullError,
    QueueTooSmallError,
    SearchFailedError,
)
from searchrl.retrieval.server_metrics import ServerMetrics
from searchrl.retrieval.types import Index
from searchrl.retrieval.wire import (
    INDEX_HEADER,
    MAX_BODY_BYTES,
    TIMEOUT_HEADER,
    Answer,
    BadRequestError,
    parse_request,
    render_answer,
)

if TYPE_CHECKING:
    from searchrl.retrieval.corpus import Corpus

BODY_TIMEOUT_S = 10.0
_CLIENT_LEFT = 499  # nginx's; nobody reads that answer, the metrics count it


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

    @property
    def identity(self) -> str:
        """Names what the answers depend on: the index, and the shuffling if there is one."""
        if self.shuffle_seed is None:
            return self.fingerprint
        return f"{self.fingerprint}-shuffled-{self.shuffle_seed}"


def create_app(
    service: Service,
    *,
    max_queue: int = 8192,
    max_batch: int = 128,
    cache_size: int = 32768,
    deduplicate: bool = True,
    token: str | None = None,
) -> Starlette:
    """Return the ASGI application.

    ``token``, if given, must come as ``Authorization: Bearer`` with each ``/retrieve``; ``/health`` and
    ``/metrics`` stay open, for they tell numbers and fingerprints only. The other arguments are those of
    `MicroBatcher`.
    """
    metrics = ServerMetrics()
    metrics.describe(rows=len(service.corpus), fingerprint=service.identity, version=__version__)
    batcher = MicroBatcher(
        _compute(service),
        service.identity,
        max_queue=max_queue,
        max_batch=max_batch,
        cache_size=cache_size,
        deduplicate=deduplicate,
        metrics=metrics,
    )
    endpoints = _Endpoints(service, batcher, metrics, token)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        batcher.close()

    return Starlette(
        routes=[
            Route("/retrieve", endpoints.retrieve, methods=["POST"]),
            Route("/health", endpoints.health),
            Route("/metrics", endpoints.metrics),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _bug},
        lifespan=lifespan,
    )


class _Endpoints:
    def __init__(
        self, service: Service, batcher: MicroBatcher, metrics: ServerMetrics, token: str | None
    ) -> None:
        self._service = service
        self._batcher = batcher
        self._metrics = metrics
        self._token = token
        self._started = time.monotonic()

    async def retrieve(self, request: Request) -> Response:
        started = time.monotonic()
        try:
            response = await self._answer(request, started)
        except BadRequestError as error:
            response = _refusal(error.status, error, also=error.also)
            if error.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
        except QueueFullError as error:
            response = _refusal(503, error)
            response.headers["Retry-After"] = str(error.retry_after_s)
        except QueueTooSmallError as error:
            response = _refusal(413, error)
        except DeadlineError as error:
            response = _refusal(504, error)
        except SearchFailedError as error:
            response = _refusal(500, error)
        except ClientDisconnect:
            response = Response(status_code=_CLIENT_LEFT)
        response.headers[INDEX_HEADER] = self._service.identity
        self._metrics.request(response.status_code, time.monotonic() - started)
        return response

    async def _answer(self, request: Request, started: float) -> Response:
        self._authorize(request)
        timeout_s = _timeout_s(request)
        wanted = parse_request(await _body(request))
        if timeout_s is not None:
            timeout_s = max(0.0, started + timeout_s - time.monotonic())
        submission = self._batcher.submit(wanted.queries, wanted.top_k, timeout_s=timeout_s)
        answers = await _while_connected(request, submission)
        body = render_answer(answers, return_scores=wanted.return_scores)
        return Response(body, media_type="application/json")

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise BadRequestError("this server needs a token: Authorization: Bearer TOKEN", status=401)
        if not hmac.compare_digest(given.strip().encode(), self._token.encode()):
            raise BadRequestError("wrong bearer token", status=401)

    async def health(self, _: Request) -> Response:
        return JSONResponse(
            {
                "status": "ok",
                "index": self._service.identity,
                "rows": len(self._service.corpus),
                "shuffle_seed": self._service.shuffle_seed,
                "version": __version__,
                "uptime_s": round(time.monotonic() - self._started, 3),
                "queue": self._batcher.queue_depth,
                "computing_s": round(self._batcher.computing_s, 3),
            }
        )

    async def metrics(self, request: Request) -> Response:
        body, content_type = self._metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})


def _refusal(status: int, reason: Exception, *, also: Mapping[str, object] | None = None) -> Response:
    return JSONResponse({"error": str(reason), **(also or {})}, status_code=status)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def _bug(_: Request, error: Exception) -> Response:
    """Answer in JSON what nobody expected; Starlette raises it again for the log."""
    return _refusal(500, RuntimeError(f"unexpected {type(error).__name__}, see the server's log"))


def _timeout_s(request: Request) -> float | None:
    """Return the seconds the client will wait, None if it does not say."""
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        raise BadRequestError(f"{TIMEOUT_HEADER} must be a whole number of milliseconds", status=400)
    return int(value) / 1000


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
    return bytes(body)


async def _while_connected(request: Request, submission: Coroutine[Any, Any, list[Answer]]) -> list[Answer]:
    """Return what ``submission`` does; cancel it and raise `ClientDisconnect` when the client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.create_task(submission), asyncio.create_task(left())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()


def _compute(service: Service) -> Callable[[Sequence[str], int], list[Answer]]:
    """Return the search down to the corpus's lines, whose reading may wait for the disk."""
    replacement = _replacement(len(service.corpus), service.shuffle_seed)

    def compute(queries: Sequence[str], top_k: int) -> list[Answer]:
        return [
            [(service.corpus.raw(replacement(hit.row)), hit.score) for hit in hits]
            for hits in service.index.search(queries, top_k)
        ]

    return compute


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
