"""Kill a run at random moments, resume it each time, and compare it with one that nobody killed.

    python benchmarks/faults/kill.py --out SCRATCH --kills 24
    python benchmarks/faults/kill.py --out SCRATCH --kills 8 --ranks 2

An uninterrupted run is the reference. Another with the same settings gets kill -9 at a random moment of a
rollout, an update, a sync and a save in turn, and is started again with ``resume=auto``, as often as it takes
to reach its last step; then the next one begins, until there were as many kills as asked. Everything that a
step records must be equal to the reference's: metrics (but times, memory and what depends on them), token ids
and observations of all trajectories, at the end the weights. Rewards are noise, drawn from the generators of
Python, NumPy and torch, so that every step learns, and other random numbers would show. Further arguments are
overrides for both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from searchrl.trajectory import Example, Trajectory

TARGETS = ("rollout", "update", "sync", "save")
SETTINGS = (
    *("+experiment=smoke", "eval.questions=2", "saving={every: 2, keep: 3}"),
    *("reward=em", "reward.kind=custom", "reward.import_path=kill:noisy"),
)
TIMED = (
    *("time/", "memory/", "machine/", "throughput/", "sync/seconds", "sync/load", "sync/probe"),
    *("retrieval/latency", "retrieval/requests", "retrieval/retries"),
)
"""Metrics about the machine, not about what was learnt."""


NEVER = 10**9
COUNTS: dict[str, Callable[[random.Random], int]] = {
    "rollout": lambda rng: (
        2 * rng.randint(1, 4) - 1
    ),  # a step waits for rollouts twice: for its own, then ahead
    "update": lambda rng: rng.randint(1, 4),
    "sync": lambda rng: rng.randint(1, 4),
    "save": lambda rng: rng.randint(1, 2),
}
"""How often a target begins before it is the one in which a run is killed."""


def noisy(trajectory: Trajectory, example: Example) -> float:
    """A reward that depends on every global generator."""
    import numpy as np
    import torch

    return random.random() + float(np.random.rand()) + float(torch.rand(()))


@dataclass(kw_only=True, slots=True, frozen=True)
class Kill:
    """One kill, and what came of it."""

    number: int
    moment: str
    """What the run was doing, by its log."""
    step: int
    after_s: float
    """Seconds since that began."""
    unfinished: bool
    """A part of a checkpoint was left."""
    resumed: str
    """Where the next start continued."""
    same: bool
    """Everything recorded up to the next end, in that start too, equals the reference."""


def command(run_dir: Path, overrides: Sequence[str]) -> list[str]:
    """Train, or go on."""
    return [
        *(sys.executable, "-m", "searchrl.cli", "train", *SETTINGS),
        *(f"run_dir={run_dir}", "resume=auto", *overrides),
    ]


def environment() -> dict[str, str]:
    """With this file among the modules."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def events(run_dir: Path, offset: int = 0) -> list[dict[str, Any]]:
    """Whole lines of the run's log from a place in the file on."""
    path = run_dir / "events.jsonl"
    content = path.read_bytes()[offset:] if path.exists() else b""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def target(event: Mapping[str, Any]) -> str | None:
    """Which of the targets begins with this event."""
    if event["event"] == "checkpoint_begun":
        return "save"
    return event["phase"] if event["event"] == "phase_start" and event["phase"] in TARGETS else None


def durations(run_dir: Path) -> dict[str, float]:
    """Seconds that each target takes, the longest of them."""
    found: dict[str, list[float]] = {name: [] for name in TARGETS}
    begun: dict[str, float] = {}
    for event in events(run_dir):
        if (name := target(event)) is not None:
            begun[name] = event["time"]
        elif event["event"] == "phase_end" and event["phase"] in begun:
            found[event["phase"]].append(event["time"] - begun.pop(event["phase"]))
        elif event["event"] == "checkpoint_saved":
            found["save"].append(event["time"] - begun.pop("save"))
    return {name: max(seconds) for name, seconds in found.items()}


def live(run_dir: Path, overrides: Sequence[str], aim: str, count: int, delay_s: float) -> tuple[str, bool]:
    """Start or resume the run; kill it ``delay_s`` after ``aim`` has begun ``count`` times.

    Returns:
        What it printed, and whether it came to its end before.
    """
    path = run_dir / "events.jsonl"
    offset = path.stat().st_size if path.exists() else 0
    printed = run_dir.with_suffix(".txt")
    with (
        printed.open("w") as output,
        subprocess.Popen(
            command(run_dir, overrides), stdout=output, stderr=subprocess.STDOUT, env=environment()
        ) as process,
    ):
        while process.poll() is None:
            if sum(target(event) == aim for event in events(run_dir, offset)) >= count:
                time.sleep(delay_s)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
    text = printed.read_text(encoding="utf-8")
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run ended with code {process.returncode}:\n{text}")
    return text, process.returncode == 0


def moment(run_dir: Path, killed: float) -> tuple[str, int, float]:
    """What the run was doing when it ended, its step, and for how long."""
    doing, step, since = "start", 0, killed
    for event in events(run_dir):
        if event["event"] == "run_start":
            doing, step, since = "start", 0, event["time"]
        elif event["event"] in ("phase_start", "checkpoint_begun"):
            doing, step, since = event.get("phase", "save"), event["step"], event["time"]
        elif event["event"] in ("phase_end", "checkpoint_saved"):
            doing, step, since = f"after {doing}", event["step"], event["time"]
    return doing, step, killed - since


def recorded(run_dir: Path) -> Iterator[tuple[str, Any]]:
    """Everything about what was learnt and sampled, by name."""
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for record in (json.loads(line) for line in lines if line.endswith(b"\n")):
        kept = {name: value for name, value in record.items() if not name.startswith(TIMED)}
        kind = "metrics" if "time/step" in record else "evaluation"
        yield f"{kind} of step {record['step']}", kept
        for path in sorted((run_dir / "trajectories").glob(f"step-{record['step']:06d}.*")):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            yield (
                path.name,
                [
                    (
                        row["id"],
                        row["reward"],
                        [(turn["token_ids"], turn["appended"]) for turn in row["turns"]],
                    )
                    for row in rows
                ],
            )


def differences(run_dir: Path, reference: Mapping[str, Any]) -> list[str]:
    """What is recorded otherwise than in the reference."""
    return [name for name, value in recorded(run_dir) if value != reference[name]]


def chain(
    out: Path, reference: Path, overrides: Sequence[str], number: int, kills: int, rng: random.Random
) -> Iterator[Kill]:
    """One run, killed up to ``kills`` times until it ends."""
    run_dir, expected, longest = out / f"run-{number}", dict(recorded(reference)), durations(reference)
    aims = cycle(rng.sample(TARGETS, len(TARGETS)))
    before: tuple[str, int, float, bool] | None = None
    ended = False
    done = 0
    while not ended:
        aim = next(aims)
        text, ended = live(
            run_dir,
            overrides,
            aim,
            NEVER if done == kills else COUNTS[aim](rng),
            rng.uniform(0.0, longest[aim]),
        )
        killed = time.time()
        if before is not None:
            doing, step, after_s, unfinished = before
            lines = [line for line in text.splitlines() if line.startswith("resume: ")]
            yield Kill(
                number=done,
                moment=doing,
                step=step,
                after_s=after_s,
                unfinished=unfinished,
                resumed="; ".join(lines) or "not reached",
                same=(run_dir / "metrics.jsonl").exists() and not differences(run_dir, expected),
            )
        if not ended:
            done += 1
            unfinished = any((run_dir / "checkpoints").glob(".step-*"))
            before = (*moment(run_dir, killed), unfinished)
    if lacking := expected.keys() - dict(recorded(run_dir)).keys():
        raise SystemExit(f"{run_dir} lacks {sorted(lacking)}")
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run_dir, reference)]
    print(
        f"run {number}: final weights {'identical' if weights[0] == weights[1] else 'DIFFER'}",
        file=sys.stderr,
    )
    if weights[0] != weights[1]:
        raise SystemExit(f"the weights of {run_dir} are not those of {reference}")


def main() -> None:
    """Read the arguments, make the reference, kill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for the runs, one that is not there"
    )
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    parser.add_argument("--steps", type=int, default=8, help="of a run")
    parser.add_argument("--ranks", type=int, default=1)
    args, more = parser.parse_known_args()
    overrides = [f"steps={args.steps}", f"processes={args.ranks}", *more]
    args.out.mkdir(parents=True)
    reference, rng = args.out / "reference", random.Random(args.seed)
    _, ended = live(reference, overrides, "save", NEVER, 0.0)
    assert ended
    print("| kill | moment | step | seconds into it | part of a checkpoint left | the next start | equal |")
    print("|" + "---|" * 7)
    seen: list[Kill] = []
    number = 0
    while len(seen) < args.kills:
        for kill in chain(args.out, reference, overrides, number, args.kills - len(seen), rng):
            seen.append(kill)
            cells = (
                *(str(len(seen)), kill.moment, str(kill.step), f"{kill.after_s:.3f}"),
                *("yes" if kill.unfinished else "no", kill.resumed.removeprefix("resume: ")),
                "yes" if kill.same else "NO",
            )
            print("| " + " | ".join(cells) + " |", flush=True)
        number += 1
    counts = Counter(kill.moment.removeprefix("after ") for kill in seen)
    spread = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    equal = sum(kill.same for kill in seen)
    print(f"\n{len(seen)} kills ({spread}) in {number} runs of {args.steps} steps; equal after {equal}")


if __name__ == "__main__":
    main()
