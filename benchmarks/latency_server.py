"""A search server that takes its time: Search-R1's ``/retrieve`` with a lognormal latency for every query.

    python benchmarks/latency_server.py --mean 0.2 --sigma 0.6 --corpus assets/worldfacts/corpus.jsonl

It prints its address and serves until it is stopped. The seconds and the passages depend on nothing but the
query, so that runs can be compared; passages are drawn from the corpus by the query's hash, and a request is
answered when its slowest query is. Nothing is computed: what it costs is waiting. For other benchmarks::

    with serving(mean_s=0.2) as url: ...
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import math
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import NormalDist

SIGMA = 0.6
"""Of the latency's logarithm: with a mean of 200 ms the median is 167 ms and the 99th percentile 675 ms."""
CORPUS = Path("assets/worldfacts/corpus.jsonl")


def fraction(query: str, salt: str) -> float:
    """A number in (0, 1) that depends on the query alone."""
    digest = hashlib.blake2b(f"{salt}/{query}".encode(), digest_size=6).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**48


def latency_s(query: str, mean_s: float, sigma: float) -> float:
    """Seconds that ``query`` takes, lognormal with this mean; 0 if the mean is."""
    if mean_s == 0:
        return 0.0
    return mean_s * math.exp(sigma * NormalDist().inv_cdf(fraction(query, "latency")) - sigma**2 / 2)


def passages(query: str, lines: Sequence[bytes], top_k: int) -> list[tuple[bytes, float]]:
    """``top_k`` consecutive lines of the corpus, from a place that the query decides, with falling scores."""
    first = int(fraction(query, "passage") * len(lines))
    return [(lines[(first + rank) % len(lines)], float(top_k - rank)) for rank in range(top_k)]


@contextmanager
def serving(*, mean_s: float, sigma: float = SIGMA, corpus: Path = CORPUS) -> Iterator[str]:
    """A server in a process of its own; gives its base URL."""
    command = [
        sys.executable,
        __file__,
        "--mean",
        str(mean_s),
        "--sigma",
        str(sigma),
        "--corpus",
        str(corpus),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit(f"the latency server ended with code {process.wait()}")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    """Serve."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    from searchrl.retrieval.wire import BadRequestError, parse_request, render_answer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mean", type=float, default=0.2, help="mean seconds of a query; 0: at once")
    parser.add_argument("--sigma", type=float, default=SIGMA, help="standard deviation of its logarithm")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    args = parser.parse_args()
    lines = args.corpus.read_bytes().splitlines()

    async def retrieve(request: Request) -> Response:
        try:
            search = parse_request(await request.body())
        except BadRequestError as error:
            return JSONResponse({"detail": str(error)} | error.also, status_code=error.status)
        await asyncio.sleep(max(latency_s(query, args.mean, args.sigma) for query in search.queries))
        answers = [passages(query, lines, search.top_k) for query in search.queries]
        body = render_answer(answers, return_scores=search.return_scores)
        return Response(body, media_type="application/json")

    async def health(request: Request) -> Response:
        del request
        return JSONResponse({"status": "ok"})

    routes = [Route("/retrieve", retrieve, methods=["POST"]), Route("/health", health)]
    with socket.create_server(("127.0.0.1", args.port), backlog=1024) as listener:
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error"))
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()
