"""Faults injected into real runs by a separate process, and what was seen.

    python benchmarks/faults/inject.py --folder SCRATCH [--only clock disk …]

Every run is `searchrl train +experiment=smoke` with its real parts: random tiny policy, vLLM, DeepSpeed, BM25
server. It needs the worldfacts corpus and its index under ``assets`` and, for the full disk, the right to
mount a small file system. Results are kept in ``SCRATCH/rows.json``, and printed as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from proxy import proxied, set_mode
from runs import SERVER, SOURCE, Folder, finished, started, until

OUTAGE_S = 20.0
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long offset(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("CLOCK_OFFSET"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += offset();
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec; now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (out) *out = exact.tv_sec;
    return exact.tv_sec;
}
"""
"""Lets the wall clock, and only that, jump by the seconds in a file: for LD_PRELOAD."""

Row = tuple[str, str, str, bool]
"""Fault, expected, seen; whether they agree."""


def finished_reference(where: Path) -> Folder:
    """Four steps without a fault, made if need be."""
    folder = where / "runs" / "reference"
    if (folder / "model").exists():
        return Folder(folder=folder)
    return finished(where, "reference", "steps=4")


# --- the search server ----------------------------------------------------------------------------------


@contextmanager
def server(where: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """A search server, ready, on a port of its own."""
    command = [sys.executable, "-m", SERVER, "--port", str(port)]
    command += ["--index", "assets/indexes/worldfacts-bm25", "--corpus", "assets/worldfacts/corpus.jsonl"]
    with subprocess.Popen(
        command,
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "serving on port" in line:
                    break
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield process
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def outage(where: Path, name: str, strike: Callable[[Path, int], None]) -> str:
    """Six steps with a server elsewhere, struck after the first; what was seen of it."""
    port = free_port()
    with server(where, port) as searching, proxied(where, port) as (proxy_port, mode):
        urls = ("retrieval=http", f"retrieval.urls=[http://127.0.0.1:{proxy_port}]", "steps=6")
        with started(where, name, *urls) as run:
            run.await_text(r"step 1/6")
            strike(mode, searching.pid)
            code = run.end()
    steps = run.records()
    paused = sum(step["retrieval/paused_s"] for step in steps)
    void = sum(step["rollout/void"] for step in steps)
    slowest = max(step["retrieval/latency_p99"] for step in steps)
    said = re.findall(r"retriever: (no search works|searches work again)", run.text)
    return (
        f"exit {code}, {len(steps)} of 6 steps, {paused:.0f} s paused, slowest search {slowest:.1f} s, "
        f"void {void:.0%}; said: {', '.join(said) or '-'}"
    )


def hung(mode: Path, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(OUTAGE_S)
    os.kill(pid, signal.SIGCONT)


def slow(mode: Path, pid: int) -> None:
    set_mode(mode, "slow")
    time.sleep(OUTAGE_S)
    set_mode(mode, "ok")


def garbage(mode: Path, pid: int) -> None:
    set_mode(mode, "garbage")
    time.sleep(OUTAGE_S)
    set_mode(mode, "ok")


def refused(mode: Path, pid: int) -> None:
    set_mode(mode, "refuse")
    time.sleep(OUTAGE_S)
    set_mode(mode, "ok")


def retriever_outages(where: Path) -> list[Row]:
    """Down, hanging, slow and answering nonsense for a while."""
    rows = []
    for name, strike, expected in (
        ("connections refused", refused, "pauses, says so, goes on; nothing is void"),
        ("hung (SIGSTOP)", hung, "pauses, says so, goes on; nothing is void"),
        ("half a second slower", slow, "searches take longer; nothing is void"),
        ("answers with a maintenance page", garbage, "pauses, says so, goes on; nothing is void"),
    ):
        seen = outage(where, strike.__name__, strike)
        good = "exit 0, 6 of 6 steps" in seen and "void 0%" in seen
        good &= ("no search works, searches work again" in seen) == (strike is not slow)
        rows.append((f"search server {name} for {OUTAGE_S:g} s", expected, seen, good))
    return rows


def retriever_killed(where: Path) -> list[Row]:
    """The embedded server, by kill -9."""
    with started(where, "killed", "steps=4") as run:
        run.await_text(r"step 1/4")
        os.kill(run.pid_of(SERVER), signal.SIGKILL)
        code = run.end()
    same = without_times(run) == without_times(finished_reference(where))
    seen = f"exit {code}, metrics {'equal to' if same else 'OTHER than'} those of a run without a fault"
    return [
        (
            "embedded search server killed (kill -9)",
            "started again on its port; costs time only",
            seen,
            code == 0 and same,
        )
    ]


def searches(where: Path) -> list[Row]:
    """The same for the search client alone, which needs no model: 8 x 8 searches, a fault of 8 s."""
    import asyncio

    from searchrl.retrieval.client import HttpRetriever
    from searchrl.retrieval.meter import MeteredRetriever, RetrievalMeter
    from searchrl.retrieval.outage import PatientRetriever

    async def play(url: str, strike: Callable[[], None], heal: Callable[[], None]) -> dict[str, float]:
        meter = RetrievalMeter()
        client = HttpRetriever([url], timeout_s=2.0, deadline_s=4.0, meter=meter)
        patient = PatientRetriever(client, patience_s=120.0, meter=meter, say=lambda _: None)
        retriever = MeteredRetriever(patient, meter)

        async def episode(number: int) -> None:
            for search in range(8):
                await retriever.search(f"capital of country {number} {search}", 1)
                await asyncio.sleep(0.3)

        asyncio.get_running_loop().call_later(1.0, strike)
        asyncio.get_running_loop().call_later(9.0, heal)
        await asyncio.gather(*(episode(number) for number in range(8)), return_exceptions=True)
        await client.aclose()
        return meter.take().metrics()

    rows: list[Row] = []
    for fault in ("refuse", "hung", "slow", "garbage"):
        port = free_port()
        with server(where, port) as searching, proxied(where, port) as (proxy_port, mode):
            if fault == "hung":
                strike, heal = (
                    partial(searching.send_signal, signal.SIGSTOP),
                    partial(searching.send_signal, signal.SIGCONT),
                )
            else:
                strike, heal = partial(set_mode, mode, fault), partial(set_mode, mode, "ok")
            seen = asyncio.run(play(f"http://127.0.0.1:{proxy_port}", strike, heal))
        answered, failed, paused = (seen[f"retrieval/{name}"] for name in ("status/ok", "failed", "paused_s"))
        told = f"{answered:.0f} of 64 answered, {failed:.0f} failed, {paused:.1f} s paused, "
        told += f"slowest {seen['retrieval/latency_p99']:.1f} s"
        expected = "all answered, " + ("no pause" if fault == "slow" else "after a pause")
        rows.append(
            (f"client alone: {fault}", expected, told, answered == 64 and (paused > 0) != (fault == "slow"))
        )
    return rows


def impatient(seconds: int) -> tuple[str, ...]:
    """Settings under which searches fail soon."""
    return ("retrieval.timeout_s=1", "retrieval.deadline_s=2", f"retrieval.patience_s={seconds}")


def retriever_gone(where: Path) -> list[Row]:
    """An outage that does not end: pause, stop with a checkpoint, and resume once it is over."""
    port = free_port()
    urls = ("retrieval=http", f"retrieval.urls=[http://127.0.0.1:{port}]", "steps=50")
    with server(where, port) as searching, started(where, "gone", *urls, *impatient(5)) as run:
        run.await_text(r"step 2/50")
        searching.kill()
        begin = time.monotonic()
        code = run.end()
        seconds = time.monotonic() - begin
    said = [word for word in ("no search works", "given up", "saved after step") if word in run.text]
    newest = run.checkpoints()[-1]
    with server(where, port):
        again = finished(where, "gone", *urls[:2], "steps=4", "resume=true")
    goes_on = f"continuing after step {int(newest[5:])}" in again.text
    seen = (
        f"exit {code} after {seconds:.0f} s; said: {', '.join(said)}; {newest}; the server back, resume=true "
        f"{'went on from it to the end' if goes_on else 'DID NOT go on from it'}"
    )
    good = code == 1 and len(said) == 3 and goes_on and len(again.records()) == 4
    return [
        (
            "search server gone for good (patience 5 s)",
            "pause, clean stop with a checkpoint (exit 1), resume",
            seen,
            good,
        )
    ]


def no_gradient_from_failed_searches(where: Path) -> list[Row]:
    """Trained tokens, as counted by the update, are those of the survivors in the trajectory log."""
    settings = ("steps=6", "retrieval.max_failed_fraction=1", *impatient(0))
    with started(where, "void", *settings) as run:
        for step in (1, 3):  # hangs in the middle of the second step and of the fourth
            run.await_text(rf"step {step}/6")
            pid = run.pid_of(SERVER)
            time.sleep(0.3)
            os.kill(pid, signal.SIGSTOP)
            run.await_text(rf"step {step + 1}/6")
            os.kill(pid, signal.SIGCONT)
        code = run.end()
    void = trained = expected = 0
    for step, record in enumerate(run.records(), start=1):
        lines = (run.folder / "trajectories" / f"step-{step:06d}.rank0.jsonl").read_text().splitlines()
        groups: dict[str, list[dict[str, Any]]] = {}
        for one in map(json.loads, lines):
            groups.setdefault(one["id"].split("/")[0], []).append(one)
        for members in groups.values():
            alive = [one for one in members if one["outcome"] != "tool_failed"]
            void += len(members) - len(alive)
            if len({one["reward"] for one in alive}) > 1:
                expected += sum(count for one in alive for _, count in one["provenance"])
        trained += int(record["update/trained_tokens"])
    seen = (
        f"exit {code}; {void} void trajectories; tokens trained {trained}, of survivors in the log {expected}"
    )
    return [
        (
            "searches fail within steps (server hangs, patience 0)",
            "failed searches void their trajectories, none of which is trained",
            seen,
            code == 0 and void > 0 and trained == expected,
        )
    ]


# --- signals --------------------------------------------------------------------------------------------


def preempted(where: Path) -> list[Row]:
    """SIGTERM in each phase; every run continues from the checkpoint of the one before."""
    rows: list[Row] = []
    for phase in ("rollout", "logprob", "update", "sync", "saving"):
        settings = ["steps=50", f"saving.every={int(phase == 'saving')}", *(["resume=true"] if rows else [])]
        with started(where, "preempted", *settings) as run:
            step = int(run.await_text(r"step (\d+)/50")[1]) + 1
            run.await_events(partial(in_phase, phase=phase, step=step))
            run.process.send_signal(signal.SIGTERM)
            begin = time.monotonic()
            code = run.end()
            seconds = time.monotonic() - begin - 0.5
            left = run.left()
        done, newest = run.records()[-1]["step"], int(run.checkpoints()[-1][5:])
        seen = f"exit {code} after {seconds:.1f} s; {done} steps logged, {newest} saved; left: {left or '-'}"
        good = code == 75 and done == newest and not left
        rows.append(
            (f"SIGTERM in {phase} of step {step}", "exit 75 with a checkpoint, nothing left", seen, good)
        )
    done = newest + 1
    resumed = finished(where, "preempted", f"steps={done}", "resume=true")
    reference = finished(where, "uninterrupted", f"steps={done}")
    same = without_times(resumed) == without_times(reference)
    seen = f"{done} steps, {'equal' if same else 'DIFFERENT'} metrics"
    return [*rows, ("these five together, resumed", "the metrics of a run without a fault", seen, same)]


def in_phase(events: list[dict[str, Any]], *, phase: str, step: int) -> bool:
    """Whether the run has come into this phase; it saves when the engine makes room after a sync."""
    told = [(event["event"], event.get("phase")) for event in events if event["step"] == step]
    if phase != "saving":
        return ("phase_start", phase) in told
    synced = ("phase_end", "sync")
    return synced in told and ("engine_sleep", None) in told[told.index(synced) :]


def one_rank(where: Path) -> list[Row]:
    """Of two ranks, one gets a signal, or dies; and all of it at once."""
    rows = []
    for name, rank, sent, expected_code, expected in (
        ("SIGUSR1 to the second of two ranks", 1, signal.SIGUSR1, 75, "both save and end, exit 75"),
        ("kill -9 of the second of two ranks", 1, signal.SIGKILL, 1, "exit 1, names it; nothing left"),
        (
            "kill -9 of the command of two ranks",
            None,
            signal.SIGKILL,
            -9,
            "ranks end; no process, no shared memory",
        ),
        ("SIGTERM to the command of two ranks", None, signal.SIGTERM, 75, "both save and end, exit 75"),
        ("Ctrl-C on two ranks, once", None, signal.SIGINT, 130, "both save and end, exit 130"),
        ("Ctrl-C on two ranks, twice", None, signal.SIGINT, 130, "ends at once, exit 130"),
    ):
        run_name = re.sub(r"\W+", "-", name)
        with started(where, run_name, "steps=50", "processes=2", "engine.tensor_parallel=2") as run:
            run.await_text(r"step 1/50")
            target = run.process.pid if rank is None else run.pid_of("searchrl.cli", rank=rank)
            begin = time.monotonic()
            os.kill(target, sent)
            if "twice" in name:
                time.sleep(0.2)
                os.kill(target, sent)
            code = run.end()
            seconds = time.monotonic() - begin - 0.5
            left = [one for one in run.left() if not (sent is signal.SIGKILL and one.startswith("searchrl-"))]
        said = re.findall(r"searchrl: (.*)", run.text)
        seen = f"exit {code} after {seconds:.1f} s; {said[-1] if said else 'silent'}; left: {left or '-'}"
        good = (
            code == expected_code
            and not left
            and (rank != 1 or sent is not signal.SIGKILL or "rank 1" in seen)
        )
        rows.append((name, expected, seen, good))
    return rows


# --- the machine ----------------------------------------------------------------------------------------


def disk(where: Path) -> list[Row]:
    """The file system of the checkpoints is too small for the second one."""
    reference = finished_reference(where)
    folder = where / "runs" / "full" / "checkpoints"
    folder.mkdir(parents=True)
    newest = reference.folder / "checkpoints" / reference.checkpoints()[-1]
    size = sum(path.stat().st_size for path in newest.rglob("*"))
    small, large = int(1.5 * size), 8 * size
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={small}", "none", str(folder)], check=True)
    try:
        with started(where, "full", "steps=4", "saving.every=1") as run:
            code = run.end()
            left = run.left()
            kept = run.checkpoints()
            subprocess.run(["mount", "-o", f"remount,size={large}", str(folder)], check=True)
        again = finished(where, "full", "steps=4", "resume=true")
        same = without_times(again) == without_times(reference)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    last = run.text.strip().splitlines()[-1][:120]
    seen = f"exit {code}: {last}; kept {', '.join(kept)}; left: {left or '-'}; with room, resumed to "
    seen += "the metrics of a run without a fault" if same else "OTHER metrics than without a fault"
    good = code == 1 and kept == ["step-000001"] and same and not left
    return [
        (
            "disk full while the second checkpoint is saved",
            "exit 1; the first stays whole; resumes",
            seen,
            good,
        )
    ]


def clock(where: Path) -> list[Row]:
    """The wall clock of the run jumps forth by a day and back by two; monotonic ones go on."""
    source, library, offset = where / "clock.c", where / "clock.so", where / "offset"
    source.write_text(CLOCK)
    offset.write_text("0")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"], check=True)
    with started(where, "clock", "steps=4", LD_PRELOAD=str(library), CLOCK_OFFSET=str(offset)) as run:
        for step, jump in ((1, 86400), (2, -86400)):
            run.await_text(rf"step {step}/4")
            offset.write_text(str(jump))
        code = run.end()
    events = [json.loads(line)["time"] for line in (run.folder / "events.jsonl").read_text().splitlines()]
    jumps = sum(abs(b - a) > 3600 for a, b in pairwise(events))
    longest = max(record["time/step"] for record in run.records())
    same = without_times(run) == without_times(finished_reference(where))
    seen = f"exit {code}, {jumps} jumps in events.jsonl, longest step {longest:.1f} s, "
    seen += f"{'equal' if same else 'OTHER'} metrics"
    good = code == 0 and jumps == 2 and same and longest < 600
    return [("wall clock jumps by +1 and -2 days", "durations and deadlines do not notice", seen, good)]


def port(where: Path) -> list[Row]:
    """The port of a search server is taken: at its start, and when the embedded one has to come back."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            SERVER,
            "--port",
            str(number),
            "--index",
            "assets/indexes/worldfacts-bm25",
        ]
        ended = subprocess.run(
            [*command, "--corpus", "assets/worldfacts/corpus.jsonl"],
            cwd=where,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            capture_output=True,
            text=True,
            check=False,
        )
    line = ended.stderr.strip().splitlines()[-1].replace(str(number), "N")
    rows = [
        (
            "`searchrl serve` on a port that is taken",
            "one line, exit 2",
            f"exit {ended.returncode}: {line}",
            ended.returncode == 2,
        )
    ]
    with started(where, "port", "steps=50", *impatient(3)) as run:
        run.await_text(r"step 2/50")
        log = (run.folder / "retriever.log").read_text()
        number = int(re.findall(r"serving on port (\d+)", log)[-1])
        os.kill(run.pid_of(SERVER), signal.SIGKILL)
        with thief(number):
            code = run.end()
        left = run.left()
    kept = run.checkpoints()[-1]
    seen = f"exit {code}, {kept}, left: {left or '-'}; {'said why' if 'given up' in run.text else 'SILENT'}"
    good = code == 1 and not left and "given up" in run.text
    rows.append(
        (
            "embedded server killed, its port taken meanwhile",
            "pause, clean stop with a checkpoint",
            seen,
            good,
        )
    )
    return rows


@contextmanager
def thief(number: int) -> Iterator[None]:
    """Takes a port as soon as it is free, and answers nobody."""

    def bind() -> socket.socket | None:
        taken = socket.socket()
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", number))
        except OSError:
            taken.close()
            return None
        taken.listen()
        return taken

    with until(bind, 5.0, f"port {number}", pause_s=0.001):
        yield


def wandb(where: Path) -> list[Row]:
    """Offline beside TensorBoard, its service killed in the middle; and a sync that reaches nobody."""
    with started(where, "wandb", "steps=4", "logger=[wandb_offline,tensorboard]") as run:
        run.await_text(r"step 1/4")
        services = [pid for pid, command in run.pids().items() if "wandb-core" in command]
        for pid in services:
            os.kill(pid, signal.SIGKILL)
        code = run.end()
        left = run.left()
    records = run.records()
    steps, lost = len({one["step"] for one in records}), records[-1].get("logger/lost_records")
    said = "said" if "logger: wandb failed" in run.text else "SILENT"
    files = list(run.folder.glob("wandb/offline-run-*/*.wandb"))
    size = sum(path.stat().st_size for path in files)
    sync = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(files[0].parent)],
        cwd=where,
        env={**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    kept = sum(path.stat().st_size for path in files) == size
    seen = (
        f"{len(services)} service killed ({said}): exit {code}, {steps} steps in metrics.jsonl, "
        f"{lost or 0:.0f} known to be lost, left: {left or '-'}; "
        f"`wandb sync` to a dead address: exit {sync.returncode}, "
        f"the {size} bytes {'stay' if kept else 'CHANGED'}"
    )
    return [
        (
            "wandb offline, its service killed; sync while its server is down",
            "training goes on and says so; what was recorded stays",
            seen,
            code == 0 and steps == 4 and said == "said" and kept and size > 0,
        )
    ]


def without_times(run: Folder) -> list[dict[str, Any]]:
    """Metrics of the steps, but for what depends on time."""
    timed = (
        *("time/", "retrieval/latency", "retrieval/requests", "retrieval/retries", "retrieval/paused"),
        *("memory/", "sync/", "machine/", "throughput/"),
    )
    return [{k: v for k, v in one.items() if not k.startswith(timed)} for one in run.records()]


FAULTS: dict[str, Callable[[Path], list[Row]]] = {
    "searches": searches,
    "killed": retriever_killed,
    "outages": retriever_outages,
    "gone": retriever_gone,
    "void": no_gradient_from_failed_searches,
    "preempted": preempted,
    "ranks": one_rank,
    "disk": disk,
    "clock": clock,
    "port": port,
    "wandb": wandb,
}


def main() -> None:
    """Inject the faults, one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="an empty or an earlier scratch folder")
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--only", nargs="*", choices=list(FAULTS), default=list(FAULTS))
    args = parser.parse_args()
    where = args.folder.resolve()
    (where / "assets").mkdir(parents=True, exist_ok=True)
    for name in ("worldfacts", "indexes"):
        link = where / "assets" / name
        if not link.exists():
            link.symlink_to((args.assets / name).resolve())
    kept = where / "rows.json"
    rows: dict[str, list[Row]] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in args.only:
        begin = time.monotonic()
        try:
            rows[name] = FAULTS[name](where)
        except (SystemExit, subprocess.SubprocessError, OSError) as error:
            rows[name] = [(name, "", f"NOT INJECTED: {error}"[:300], False)]
        kept.write_text(json.dumps(rows, indent=1))
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    print("| fault | expected | seen | |\n|---|---|---|---|")
    for fault, expected, seen, good in (row for some in rows.values() for row in some):
        print(f"| {fault} | {expected} | {seen} | {'as expected' if good else '**NOT AS EXPECTED**'} |")
    if not all(row[3] for some in rows.values() for row in some):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
