"""What five algorithms learn from the same number of episodes: the quickstart, three seeds each.

    python benchmarks/learning/algorithms.py run --out runs/algorithms --seeds 0 1 2
    python benchmarks/learning/algorithms.py table --out runs/algorithms

``run`` trains one after another and skips what has a folder already; several may work side by side. Delete
the folder of an interrupted run. All take two optimizer steps a rollout, so that ratios, clips and LLDS have
something to do. Checkpoints and model are deleted once a run is evaluated; metrics and trajectories stay.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ALGORITHMS: dict[str, tuple[str, ...]] = {
    "grpo": ("advantage=grpo",),
    "dr_grpo": ("advantage=dr_grpo",),
    "rloo": ("advantage=rloo",),
    "gspo": ("loss=gspo",),
    "llds": ("loss=llds",),
}
COMMON = ("+experiment=quickstart", "update.minibatches=2", "eval.before=false")


def run(out: Path, seeds: Sequence[int], algorithms: Sequence[str], steps: int, questions: int) -> None:
    """Every algorithm with every seed; seeds outermost: what an interruption leaves can be compared."""
    for seed in seeds:
        for algorithm in algorithms:
            folder = out / f"{algorithm}-{seed}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue  # finished, or another process is at it
            overrides = (f"seed={seed}", f"steps={steps}", f"eval.questions={questions}", f"run_dir={folder}")
            command = [
                sys.executable,
                "-m",
                "searchrl.cli",
                "train",
                *COMMON,
                *ALGORITHMS[algorithm],
                *overrides,
            ]
            with (folder / "log.txt").open("w", encoding="utf-8") as log:
                log.write(" ".join(command) + "\n")
                log.flush()
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
            print(f"{folder.name}: exit code {code}", flush=True)
            if code == 0:
                shutil.rmtree(folder / "checkpoints")
                shutil.rmtree(folder / "model")


def one_hop(folder: Path) -> dict[str, bool]:
    """Exact match of the final evaluation's one-hop questions, by id: training sees no others."""
    (path,) = sorted((folder / "eval").glob("step-*.json"))
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {row["id"]: row["exact_match"] for row in rows if row["hops"] == 1}


def outcome(folder: Path) -> dict[str, float] | None:
    """Final exact match of one-hop questions, and what the run trained on; None if it has not finished."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    if not records or "eval/exact_match_1_hop" not in records[-1]:
        return None
    steps = [record for record in records if "update/trained_tokens" in record]
    return {
        "em": records[-1]["eval/exact_match_1_hop"],
        "shown": records[-1]["eval/gold_shown_1_hop"],
        "steps": len(steps),
        "tokens": sum(record["update/trained_tokens"] for record in steps),
        "reward": sum(record["reward/mean"] for record in steps[-4:]) / len(steps[-4:]),
    }


def table(out: Path) -> None:
    """One row an algorithm, as Markdown; a dash where a run has not finished."""
    found = {path.parent.name: outcome(path.parent) for path in sorted(out.glob("*/metrics.jsonl"))}
    seeds = sorted({name.rpartition("-")[2] for name in found})
    heads = [
        *(f"EM, seed {seed}" for seed in seeds),
        "mean",
        "against grpo [95 %]",
        "gold shown",
        "reward, last 4",
        "1000 tokens a run",
    ]
    print("| algorithm | " + " | ".join(heads) + " |\n|---" + "|---" * len(heads) + "|")
    for algorithm in ALGORITHMS:
        runs = {seed: found.get(f"{algorithm}-{seed}") for seed in seeds}
        done = {seed: values for seed, values in runs.items() if values is not None}
        if not done:
            continue
        means = {key: fmean(values[key] for values in done.values()) for key in next(iter(done.values()))}
        compared = [seed for seed in done if found.get(f"grpo-{seed}") is not None]
        cells = [
            *("-" if values is None else f"{values['em']:.3f}" for values in runs.values()),
            f"{means['em']:.3f}",
            _against_grpo(out, algorithm, compared),
            f"{means['shown']:.3f}",
            f"{means['reward']:.3f}",
            f"{means['tokens'] / 1000:.0f}",
        ]
        print(f"| {algorithm} | " + " | ".join(cells) + " |")


def _against_grpo(out: Path, algorithm: str, seeds: Sequence[str]) -> str:
    """Mean difference in EM over the same questions, seeds pooled, and its normal 95 % interval.

    The interval knows the questions' variance, not the seeds'.
    """
    if algorithm == "grpo" or not seeds:
        return "-"
    differences = []
    for seed in seeds:
        theirs = one_hop(out / f"grpo-{seed}")
        ours = one_hop(out / f"{algorithm}-{seed}")
        differences += [float(ours[id_]) - float(theirs[id_]) for id_ in theirs]
    mean, half = fmean(differences), 1.96 * stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--questions", type=int, default=300, help="held-out questions, of which half are one-hop"
    )
    args = parser.parse_args()
    if args.action == "run":
        run(args.out, args.seeds, args.algorithms, args.steps, args.questions)
    else:
        table(args.out)


if __name__ == "__main__":
    main()
