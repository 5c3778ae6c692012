"""Seconds of a step with and without ``overlap``, beside searches that take their time.

    python benchmarks/overlap/steps.py --out SCRATCH --means 0 0.2 1 --rounds 3
    python benchmarks/overlap/steps.py --out SCRATCH --means 1 --rounds 1 --steps 4 --experiment quickstart

For every mean latency (``latency_server.py``: lognormal) both sides train in turn, ``--rounds`` times each,
from the experiment's warm-started model. A side's figure is the mean over its steps but the first and the
last, where rollout and update cannot overlap; the ratio is the median over rounds. Further arguments are
overrides for both sides.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median

SERVER = Path(__file__).parents[1] / "latency_server.py"
SIDES = {"synchronous": "overlap=false", "overlap": "overlap=true"}
COLUMNS = {
    "step s": "time/step",
    "waits for rollout s": "time/rollout",
    "rollout s": "time/rollout_span",
    "update s": "time/update",
    "latency p50 s": "retrieval/latency_p50",
    "lag": "rollout/policy_lag",
    "ESS ratio": "tis/ess_ratio",
    "update": "update/optimizer_steps",
}


def searchrl(*arguments: str) -> str:
    """Output of a command; ends this one with it if it fails."""
    command = [sys.executable, "-m", "searchrl.cli", *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {ended.returncode}:\n{ended.stdout}")
    return ended.stdout


@contextmanager
def serving(mean_s: float) -> Iterator[str]:
    """A latency server's address."""
    command = [sys.executable, str(SERVER), "--mean", str(mean_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def train(run_dir: Path, *overrides: str) -> dict[str, float]:
    """Means over the steps of a run but its first and last."""
    searchrl("train", f"run_dir={run_dir}", *overrides)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "time/step" in record][1:-1]
    return {
        name: fmean(record[name] for record in steps if name in record)
        for name in COLUMNS.values()
        if any(name in record for record in steps)
    }


def measure(out: Path, means: Sequence[float], rounds: int, common: Sequence[str]) -> None:
    """Train both sides in turn and print a line for each as soon as it is there."""
    print("| mean latency s | side | " + " | ".join(COLUMNS) + " | ratio of step seconds |")
    print("|" + "---|" * (len(COLUMNS) + 3))
    for mean_s in means:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        with serving(mean_s) as url:
            for number in range(rounds):
                for side, override in SIDES.items():
                    folder = out / f"{mean_s:g}-{side}-{number}"
                    found[side].append(
                        train(folder, *common, override, "retrieval=http", f"retrieval.urls=[{url}]")
                    )
        pairs = zip(*found.values(), strict=True)
        ratios = sorted(before["time/step"] / after["time/step"] for before, after in pairs)
        for side, runs in found.items():
            figures = [fmean(run[name] for run in runs) for name in COLUMNS.values()]
            told = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if side == "overlap" else ""
            cells = " | ".join(f"{figure:.2f}" for figure in figures)
            print(f"| {mean_s:g} | {side} | {cells} | {told} |", flush=True)


def main() -> None:
    """Read the arguments, make the model, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for the runs, one that is not there"
    )
    parser.add_argument("--means", type=float, nargs="+", default=[0.0, 0.2, 1.0], help="mean latencies in s")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run")
    parser.add_argument("--experiment", default="smoke")
    args, overrides = parser.parse_known_args()
    args.out.mkdir(parents=True)
    experiment = f"+experiment={args.experiment}"
    model = searchrl("warmstart", experiment).rpartition("initial policy: ")[2].strip()
    settings = (f"checkpoint={model}", f"steps={args.steps}", "eval.before=false", "eval.questions=1")
    measure(args.out, args.means, args.rounds, [experiment, *settings, *overrides])


if __name__ == "__main__":
    main()
