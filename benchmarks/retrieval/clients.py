"""Search client: one coalescing dispatcher against one connection for each episode.

256 episodes search at once on an event loop, as in a rollout. Both clients use httpx and talk to the same
server, whose answers are cached, so that what is measured is the client. Rounds alternate.

    python benchmarks/retrieval/clients.py --index DIR --corpus FILE --questions FILE
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from statistics import median

import httpx
from throughput import TOP_K, arguments, running

from searchrl.retrieval.client import HttpRetriever

EPISODES = 256


async def rollout(search: Callable[[str], Awaitable[object]], queries: Sequence[str]) -> None:
    """Let every episode search, one query after another, until none is left."""
    left = iter(queries)

    async def episode() -> None:
        for query in left:
            await search(query)

    await asyncio.gather(*(episode() for _ in range(EPISODES)))


async def coalesced(url: str, queries: Sequence[str]) -> None:
    retriever = HttpRetriever([url])
    await rollout(lambda query: retriever.search(query, TOP_K), queries)
    await retriever.aclose()


async def one_connection_each(url: str, queries: Sequence[str]) -> None:
    limits = httpx.Limits(max_connections=EPISODES, max_keepalive_connections=EPISODES)
    async with httpx.AsyncClient(limits=limits, timeout=60.0, trust_env=False) as http:

        async def search(query: str) -> None:
            body = {"queries": [query], "topk": TOP_K, "return_scores": True}
            response = await http.post(f"{url}/retrieve", json=body)
            assert len(response.json()["result"]) == 1

        await rollout(search, queries)


def timed(client: Callable[[str, Sequence[str]], Awaitable[None]], url: str, queries: Sequence[str]) -> float:
    """Queries per second, and prints them with the CPU time of this process."""
    wall, cpu = time.monotonic(), time.process_time()

    async def run() -> None:
        await client(url, queries)

    asyncio.run(run())
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    rate = len(queries) / wall
    print(f"| {client.__name__} | {rate:.0f} | {1000 * cpu / len(queries):.2f} |", flush=True)
    return rate


def main() -> None:
    args = arguments()
    rows = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines()]
    queries = [row["question"] for row in rows][: args.requests]
    with running(args.index, args.corpus, []) as server:
        url = f"http://127.0.0.1:{server.port}"
        asyncio.run(coalesced(url, queries))  # fills the server's cache
        print("| client | queries/s | client CPU ms/query |\n|---|---|---|")
        ratios = [
            timed(coalesced, url, queries) / timed(one_connection_each, url, queries)
            for _ in range(args.rounds)
        ]
    print(f"throughput, coalesced / one connection each: {median(ratios):.1f}")


if __name__ == "__main__":
    main()
