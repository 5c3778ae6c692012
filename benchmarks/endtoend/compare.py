"""Whole training steps: searchrl against TRL's GRPOTrainer with vLLM colocated and a search tool.

TRL is no requirement of this project. Make it a virtual environment that sees ours, then compare::

    .venv/bin/python -m venv bench/trl
    (cd .venv/lib/python3.11/site-packages && pwd) > bench/trl/lib/python3.11/site-packages/searchrl.pth
    bench/trl/bin/python -m pip install --no-deps trl==1.16.0 datasets==5.2.0 dill==0.4.1 \
        multiprocess==0.70.19 xxhash==4.1.0 pandas==3.1.1 python-dateutil==4.0.0 six==1.17.0
    python benchmarks/endtoend/compare.py --trl bench/trl/bin/python --latency 0.2
    python benchmarks/endtoend/compare.py --trl bench/trl/bin/python --latency 0

Both sides start from the same warm-started policy and see the same questions in the same order, and a search
server whose every answer takes lognormal seconds (``latency_server.py``). Runs alternate; the first step of
each is left out. Every trajectory is trained on, groups without variance too: TRL has no such filter, and
ours would make our steps shorter. What else is equal and what is not stands in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parents[1]))
from latency_server import serving
from policies import POLICIES, warm_start

COMMON = (
    "reward=em",
    "group_size=8",
    "episode.max_searches=2",
    "data.train_hops=[]",
    "episode.max_context_tokens=640",
    "episode.max_observation_tokens=128",
    "episode.max_consecutive_invalid=1",
    "engine.kv_cache_gib=1",
    "engine.max_num_seqs=64",
    "loss.kl_coef=0",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=0",
)
"""What a run of either side takes besides."""

OURS_ONLY = (
    "filters.zero_variance=false",
    "eval.before=false",
    "eval.questions=1",
    "saving.every=0",
)

Step = dict[str, float]


def ours(overrides: Sequence[str]) -> list[Step]:
    """A run of searchrl; a step lasts from one record of ``metrics.jsonl`` to the next."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "searchrl.cli",
            "train",
            *overrides,
            *OURS_ONLY,
            f"run_dir={run_dir}",
        ]
        log = Path(folder) / "log.txt"
        written: list[float] = []
        metrics = run_dir / "metrics.jsonl"
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            while process.poll() is None:
                lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                written += [time.perf_counter()] * (lines - len(written))
                time.sleep(0.005)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()}")
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "time/step" in record]
    return [_our_step(record, written[i + 1] - written[i]) for i, record in enumerate(steps[1:])]


def _our_step(record: Step, seconds: float) -> Step:
    trajectories = record["rollout/groups_sampled"] * 8
    step = {
        "step": seconds,
        "rollout": record["time/rollout"],
        "logprob": record["time/logprob"],
        "update": record["time/update"],
        "sync": record["time/sync"],
        "trajectories": trajectories,
        "tokens": record["update/trained_tokens"],
        "sampled": record["rollout/sampled_tokens"] * trajectories,
        "searches": record["search_r1/search_calls_per_sample"] * trajectories,
        "gflops": record["machine/matmul_gflops"],
    }
    return step | {"other": seconds - sum(step[phase] for phase in ("rollout", "logprob", "update", "sync"))}


def theirs(python: Path, overrides: Sequence[str], micro_batch: int, loop: str) -> list[Step]:
    """A run of TRL."""
    script = Path(__file__).with_name("trl_side.py")
    command = [str(python), str(script), "--micro-batch", str(micro_batch), "--loop", loop, *overrides]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in said.stdout.splitlines() if line.startswith("{")]
    records = [json.loads(line) for line in lines if "step_s" in line]
    if said.returncode != 0 or len(records) < 2:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.stdout}\n{said.stderr}")
    gflops = json.loads(lines[0])["matmul_gflops"]
    return [_their_step(record) | {"gflops": gflops} for record in records[1:]]


def _their_step(record: Step) -> Step:
    sync, rollout = record.get("sync", 0.0), record["rollout"]
    counts = {name: record.get(name, 0.0) for name in ("trajectories", "tokens", "sampled", "searches")}
    return counts | {
        "step": record["step_s"],
        # The first generation of a step syncs the weights, inside the rollout.
        "rollout": rollout - sync,
        "generate": record["generate"],
        "search": record.get("search", 0.0),
        "logprob": record["rollout_and_logprob"] - rollout,
        "update": record["step_s"] - record["rollout_and_logprob"],
        "sync": sync,
    }


def throughput(steps: Sequence[Step], unit: str) -> float:
    """``unit`` a second over all these steps together."""
    return sum(step[unit] for step in steps) / sum(step["step"] for step in steps)


def report(rounds: Sequence[tuple[list[Step], list[Step]]]) -> None:
    """The table, as Markdown, and the ratios of the rounds."""
    phases = ("rollout", "logprob", "update", "sync", "other")
    heads = ("trajectories/s", "tokens/s", "step s", *phases, "searches", "tokens", "sampled", "GFLOP/s")
    print("| round | side | " + " | ".join(heads) + " |\n|---" + "|---" * (len(heads) + 1) + "|")
    for number, sides in enumerate(rounds, 1):
        for name, steps in zip(("searchrl", "TRL"), sides, strict=True):
            count = sum(step["trajectories"] for step in steps)
            cells = [f"{throughput(steps, 'trajectories'):.2f}", f"{throughput(steps, 'tokens'):.0f}"]
            cells += [f"{median(step['step'] for step in steps):.2f}"]
            cells += [f"{median(step.get(phase, 0.0) for step in steps):.2f}" for phase in phases]
            cells += [
                f"{sum(step[key] for step in steps) / count:.1f}" for key in ("searches", "tokens", "sampled")
            ]
            cells += [f"{median(step['gflops'] for step in steps):.0f}"]
            print(f"| {number} | {name} | " + " | ".join(cells) + " |")
    for unit in ("trajectories", "tokens"):
        ratios = [throughput(ours, unit) / throughput(theirs, unit) for ours, theirs in rounds]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{unit}/s, searchrl / TRL: {median(ratios):.2f} ({spread})")
    trl = [step for _, steps in rounds for step in steps]
    print(
        f"of TRL's rollout: generate {median(step['generate'] for step in trl):.2f} s, "
        f"search {median(step['search'] for step in trl):.2f} s"
    )


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl", type=Path, required=True, help="Python of the environment that has TRL")
    parser.add_argument("--latency", type=float, default=0.2, help="mean seconds of a search; 0: none added")
    parser.add_argument("--policy", choices=list(POLICIES), default="tiny")
    parser.add_argument("--groups", type=int, default=8, help="questions a step, 8 episodes each")
    parser.add_argument("--steps", type=int, default=4, help="steps a run, the first of which is left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--loop",
        choices=["tools", "concurrent"],
        default="tools",
        help="TRL's own loop of turns, or a rollout_func of ours that sends all searches of a turn at once",
    )
    parser.add_argument("--micro-batch", type=int, default=16, help="TRL's trajectories a forward pass")
    args = parser.parse_args()
    policy = POLICIES[args.policy]
    checkpoint = warm_start(args.policy)
    print(f"policy: {checkpoint}", flush=True)
    rounds = []
    with serving(mean_s=args.latency) as url:
        overrides = [*policy, *COMMON, f"checkpoint={checkpoint}", f"steps={args.steps}"]
        overrides += [f"groups_per_step={args.groups}", "retrieval=http", f"retrieval.urls=[{url}]"]
        for number in range(args.rounds):
            rounds.append((ours(overrides), theirs(args.trl, overrides, args.micro_batch, args.loop)))
            print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    report(rounds)


if __name__ == "__main__":
    main()
