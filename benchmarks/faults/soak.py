"""A thousand steps of a real run, watched from outside: memory, descriptors, threads, processes stay flat.

    python benchmarks/faults/soak.py --out SCRATCH --steps 1000 --json soak.json --plot soak.md
    python benchmarks/faults/soak.py --out SCRATCH --steps 12 engine.max_num_seqs=8     # further overrides

The run is the smoke experiment with its real parts, a search server among them, and a small step: one
question, two short episodes, an update, a sync with its probe. After every step what the kernel counts for
the trainer and for its children is written down. The first half of the steps is warm-up (oneDNN's cache of
kernels takes hundreds of steps to fill, docs/operations.md); after it no quantity may grow: a line through
its values may rise by no more than its tolerance, which is printed beside it, from the first to the last
step. Ends with code 1 if one does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, linear_regression, median

SETTINGS = (
    "+experiment=smoke",
    "groups_per_step=1",
    "group_size=2",
    "filters.zero_variance=false",  # or most steps would have nothing to train on
    "eval={before: false, questions: 1}",
    "engine.max_num_seqs=4",
)
TOLERANCE = {
    "trainer_mib": 32.0,
    "children_mib": 16.0,
    "descriptors": 2.0,
    "threads": 2.0,
    "processes": 0.5,
    "shared_mib": 0.5,
}
"""By how much each quantity may rise between the end of the warm-up and the last step."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Sample:
    """What was in use after a step."""

    step: int
    seconds: float
    """Since the start."""
    trainer_mib: float
    """The trainer's resident set."""
    children_mib: float
    """That of all its descendants together."""
    descriptors: int
    """Open files, sockets and pipes of all of them."""
    threads: int
    processes: int
    shared_mib: float
    """Shared memory that they have touched, counted in each."""


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has just ended
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def status(pid: int, name: str) -> int:
    """A number of ``/proc/PID/status``; 0 for a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def descriptors(pid: int) -> int:
    """How many a process has open."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def sample(pid: int, step: int, start: float) -> Sample:
    """Look at the process and its descendants."""
    family = descendants(pid)
    return Sample(
        step=step,
        seconds=round(time.monotonic() - start, 2),
        trainer_mib=status(pid, "VmRSS") / 1024,
        children_mib=sum(status(one, "VmRSS") for one in family[1:]) / 1024,
        descriptors=sum(map(descriptors, family)),
        threads=sum(status(one, "Threads") for one in family),
        processes=len(family),
        shared_mib=sum(status(one, "RssShmem") for one in family) / 1024,
    )


def train(out: Path, steps: int, minutes: float, overrides: Sequence[str]) -> Iterator[Sample]:
    """Run so many steps, or for so long; yields a sample after each. Ends this command if the run fails."""
    metrics = out / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "searchrl.cli", "train", *SETTINGS, f"steps={steps}"]
    command += [f"run_dir={out / 'run'}", "name=soak", *overrides]
    start, seen = time.monotonic(), 0
    with (out / "printed.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.02)
                if time.monotonic() - start > 60 * minutes:
                    return
                written = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                if seen < written <= steps:
                    seen = written
                    yield sample(process.pid, seen, start)
        finally:
            if process.poll() is None:
                process.kill()
    if process.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)}\nended with code {process.returncode}; see {out / 'printed.txt'}"
        )


def rise(values: Sequence[float]) -> float:
    """By how much a line through the values (least squares) rises from the first to the last."""
    return linear_regression(range(len(values)), values).slope * (len(values) - 1)


def report(samples: Sequence[Sample]) -> list[dict[str, float | str]]:
    """A row for each quantity: after the warm-up, at the end, how far it rose, how far it may."""
    after = samples[len(samples) // 2 :]
    rows: list[dict[str, float | str]] = []
    for name, tolerance in TOLERANCE.items():
        values = [float(getattr(item, name)) for item in after]
        edge = max(1, len(values) // 10)
        rows.append(
            {
                "quantity": name,
                "after warm-up": round(median(values[:edge]), 2),
                "at the end": round(median(values[-edge:]), 2),
                "highest": round(max(values), 2),
                "rise of the line": round(rise(values), 2),
                "tolerance": tolerance,
            }
        )
    return rows


def table(rows: Sequence[dict[str, float | str]]) -> str:
    """The report in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(samples: Sequence[Sample], name: str, points: int = 50) -> str:
    """A quantity over the steps as a Mermaid chart: means of so many stretches."""
    size = max(1, len(samples) // points)
    parts = [samples[i : i + size] for i in range(0, len(samples) - size + 1, size)]
    values = [round(fmean(getattr(item, name) for item in part), 2) for part in parts]
    top = max(values) * 1.1
    return (
        f'```mermaid\nxychart-beta\n  title "{name}"\n'
        f'  x-axis "step" {samples[0].step} --> {samples[-1].step}\n'
        f"  y-axis 0 --> {top:g}\n  line {values}\n```"
    )


def main() -> None:
    """Run, report, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for the run")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop there with fewer steps")
    parser.add_argument("--json", type=Path, help="where the samples and the report are written")
    parser.add_argument("--plot", type=Path, help="where the report and the charts are written, in Markdown")
    args, overrides = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    samples = list(train(args.out, args.steps, args.minutes, overrides))
    rows = report(samples)
    print(table(rows))
    print(f"{len(samples)} samples, the last of step {samples[-1].step}, after {samples[-1].seconds:.0f} s")
    if args.json is not None:
        record = {
            "steps": samples[-1].step,
            "report": rows,
            "columns": [entry.name for entry in fields(Sample)],
            "samples": [list(asdict(item).values()) for item in samples],
        }
        args.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
    if args.plot is not None:
        charts = [plot(samples, name) for name in TOLERANCE]
        args.plot.write_text("\n\n".join([table(rows), *charts]) + "\n", encoding="utf-8")
    grown = [str(row["quantity"]) for row in rows if float(row["rise of the line"]) > float(row["tolerance"])]
    if grown:
        raise SystemExit(f"not flat: {', '.join(grown)}")


if __name__ == "__main__":
    main()
