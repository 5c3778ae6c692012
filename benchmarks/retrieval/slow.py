"""Search client and a server that takes its time: how long searches wait beyond what the server sleeps.

    python benchmarks/retrieval/slow.py --mean 1 --episodes 64 256 --connections 4 16

Episodes search twice, at random moments of some seconds; the server sleeps lognormal seconds for every query
and answers a request when its slowest query is done (``latency_server.py``).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from latency_server import serving

from searchrl.retrieval import client, endpoints


async def episodes(url: str, count: int) -> list[float]:
    """Seconds of each search, sorted."""
    retriever, rng = client.HttpRetriever([url]), random.Random(0)
    seconds: list[float] = []

    async def episode(number: int) -> None:
        for turn in range(2):
            await asyncio.sleep(rng.uniform(0.5, 6.0))
            start = time.perf_counter()
            await retriever.search(f"{number}/{turn}", 1)
            seconds.append(time.perf_counter() - start)

    await asyncio.gather(*(episode(number) for number in range(count)))
    await retriever.aclose()
    return sorted(seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mean", type=float, default=1.0, help="mean seconds of a query")
    parser.add_argument("--episodes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--connections", type=int, nargs="+", default=[4, 16], help="MAX_REQUESTS")
    args = parser.parse_args()
    print("| episodes | connections | s a search | p50 | p99 |\n|---|---|---|---|---|")
    with serving(mean_s=args.mean) as url:
        for count in args.episodes:
            for connections in args.connections:
                vars(client)["MAX_REQUESTS"] = vars(endpoints)["MAX_REQUESTS"] = connections
                seconds = asyncio.run(episodes(url, count))
                mean, p99 = sum(seconds) / len(seconds), seconds[int(len(seconds) * 0.99)]
                p50 = seconds[len(seconds) // 2]
                print(f"| {count} | {connections} | {mean:.2f} | {p50:.2f} | {p99:.2f} |", flush=True)


if __name__ == "__main__":
    main()
