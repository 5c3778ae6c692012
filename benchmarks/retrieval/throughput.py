"""Search server: batched, joined and cached against one query, one encode, one index scan per request.

Both sides are this project's server over the same index and encoder, each with one compute thread; the
reference runs with ``--max-batch 1 --cache-size 0 --no-deduplicate``. 256 connections each keep one
single-query request in flight, as 256 episodes do. Rounds alternate between the two servers and no query is
repeated over rounds, so the cache only sees what one step of GRPO would repeat.

    python benchmarks/retrieval/throughput.py --index DIR --corpus FILE --questions FILE

The steady figure is the server's CPU time per query; ratios are medians over the rounds of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

REFERENCE = ["--max-batch", "1", "--cache-size", "0", "--no-deduplicate"]
TOP_K = 3


@dataclass(kw_only=True, slots=True)
class Server:
    """A running server process."""

    pid: int
    port: int
    startup_s: float

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> tuple[float, float]:
        """Resident memory in all, and of it what is not backed by a file."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        values = {line.split(":")[0]: line.split() for line in lines if line.startswith("Rss")}
        resident = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("VmRSS")}
        return resident["VmRSS"] / 1024, int(values["RssAnon"][1]) / 1024


@dataclass(kw_only=True, slots=True)
class Sample:
    """What one server did in one round."""

    queries_per_s: float
    p50_s: float
    p99_s: float
    cpu_ms: float
    answers: list[list[str]] = field(repr=False)


@contextmanager
def running(index: Path, corpus: Path, flags: Sequence[str]) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        arguments = ["--index", index, "--corpus", corpus, "--port", 0, "--ready-file", ready, *flags]
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "searchrl.retrieval.server", *map(str, arguments)],
            stdout=subprocess.DEVNULL,
        )
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with code {process.returncode}")
                time.sleep(0.01)
            port = json.loads(ready.read_text())["port"]
            yield Server(pid=process.pid, port=port, startup_s=time.monotonic() - started)
        finally:
            process.terminate()
            process.wait(30)


async def measure(server: Server, queries: Sequence[str], connections: int) -> Sample:
    """Send ``queries`` over ``connections`` connections, one request in flight on each."""
    numbered = iter(enumerate(queries))
    latencies = [0.0] * len(queries)
    answers: list[list[str]] = [[] for _ in queries]

    async def episode() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for i, query in numbered:
            body = json.dumps({"queries": [query], "topk": TOP_K, "return_scores": True}).encode()
            started = time.monotonic()
            writer.write(
                b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            status, _, rest = head.partition(b"\r\n")
            length = next(h for h in rest.lower().split(b"\r\n") if h.startswith(b"content-length:"))
            payload = await reader.readexactly(int(length.split(b":")[1]))
            latencies[i] = time.monotonic() - started
            if b" 200 " not in status:
                raise SystemExit(f"the server answered {status.decode()}: {payload[:200]!r}")
            answers[i] = [item["document"]["id"] for item in json.loads(payload)["result"][0]]
        writer.close()

    cpu, started = server.cpu_s(), time.monotonic()
    await asyncio.gather(*(episode() for _ in range(min(connections, len(queries)))))
    seconds, cpu = time.monotonic() - started, server.cpu_s() - cpu
    latencies.sort()
    return Sample(
        queries_per_s=len(queries) / seconds,
        p50_s=latencies[len(latencies) // 2],
        p99_s=latencies[int(len(latencies) * 0.99)],
        cpu_ms=1000 * cpu / len(queries),
        answers=answers,
    )


def grouped(fresh: Iterator[str], count: int, duplicates: float, rng: random.Random) -> list[str]:
    """``count`` queries, groups of eight asked together; a share ``duplicates`` repeats one of its group."""
    queries: list[str] = []
    while len(queries) < count:
        group: list[str] = []
        for _ in range(8):
            repeat = group and rng.random() < duplicates * 8 / 7  # the first of a group never repeats
            group.append(rng.choice(group) if repeat else next(fresh))
        queries += group
    return queries[:count]


def recall(queries: Sequence[str], answers: Sequence[Sequence[str]], gold: dict[str, set[str]]) -> float:
    """Share of questions with a gold passage among the answers; two-hop questions have none in one search."""
    known = [(gold[q], set(a)) for q, a in zip(queries, answers, strict=True) if q in gold]
    return sum(bool(wanted & found) for wanted, found in known) / len(known)


def report(name: str, ours: list[Sample], reference: list[Sample], queries: list[list[str]]) -> None:
    print(f"\n{name}")
    print("| server | queries/s | p50 s | p99 s | CPU ms/query |\n|---|---|---|---|---|")
    for label, rows in (("reference", reference), ("ours", ours)):
        rate = median(s.queries_per_s for s in rows)
        p50, p99 = median(s.p50_s for s in rows), median(s.p99_s for s in rows)
        print(f"| {label} | {rate:.1f} | {p50:.2f} | {p99:.2f} | {median(s.cpu_ms for s in rows):.2f} |")

    def ratios(pairs: Sequence[float]) -> str:
        return f"{median(pairs):.1f} ({min(pairs):.1f} to {max(pairs):.1f})"

    both = list(zip(ours, reference, strict=True))
    print(f"throughput, ours / reference: {ratios([a.queries_per_s / b.queries_per_s for a, b in both])}")
    print(f"CPU per query, reference / ours: {ratios([b.cpu_ms / a.cpu_ms for a, b in both])}")
    print(f"p99, reference / ours: {ratios([b.p99_s / a.p99_s for a, b in both])}")
    pairs = [pair for a, b in both for pair in zip(a.answers, b.answers, strict=True)]
    same = sum(a == b for a, b in pairs) / len(pairs)
    repeated = 1 - sum(len(set(q)) for q in queries) / sum(len(q) for q in queries)
    print(f"ordered top-{TOP_K} identical: {same:.4f} of {len(pairs)}; repeated queries: {repeated:.3f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True, help='JSONL with "question"')
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=512, help="per server, workload and round")
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument("--duplicates", type=float, nargs="+", default=[0.0, 0.42, 0.75])
    return parser.parse_args()


def main() -> None:
    args = arguments()
    rows = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines()]
    gold = {
        row["question"]: set(row["metadata"]["gold_passages"])
        for row in rows
        if row.get("metadata", {}).get("hops") == 1
    }
    questions = list(dict.fromkeys(row["question"] for row in rows))
    rng = random.Random(0)
    rng.shuffle(questions)
    fresh = iter(questions)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {args.index}")
    with (
        running(args.index, args.corpus, REFERENCE) as reference,
        running(args.index, args.corpus, []) as ours,
    ):
        for name, server in (("reference", reference), ("ours", ours)):
            asyncio.run(measure(server, ["warm up"] * 8, 8))
            print(f"{name}: start-up {server.startup_s:.1f} s")
        for duplicates in args.duplicates:
            samples: dict[str, list[Sample]] = {"ours": [], "reference": []}
            asked: list[list[str]] = []
            for number in range(args.rounds):
                asked.append(grouped(fresh, args.requests, duplicates, rng))
                pair = [("ours", ours), ("reference", reference)]
                for name, server in pair if number % 2 else reversed(pair):
                    samples[name].append(asyncio.run(measure(server, asked[-1], args.connections)))
            report(f"duplicates {duplicates:g}", samples["ours"], samples["reference"], asked)
            for name, measured in samples.items():
                flat = [answer for sample in measured for answer in sample.answers]
                value = recall([q for queries in asked for q in queries], flat, gold)
                print(f"recall@{TOP_K} of the gold passage, {name}: {value:.4f}")
        for name, server in (("reference", reference), ("ours", ours)):
            resident, anonymous = server.memory_mib()
            print(f"{name}: resident {resident:.0f} MiB, of it anonymous {anonymous:.0f} MiB")


if __name__ == "__main__":
    main()
