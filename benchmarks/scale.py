"""A training step on N ranks, simulated from what a run and an engine measured on one.

    python benchmarks/scale.py read runs/worldfacts > benchmarks/scale_inputs.json
    python benchmarks/scale.py time benchmarks/scale_inputs.json
    python benchmarks/scale.py simulate benchmarks/scale_inputs.json

``read`` takes from ``metrics.jsonl`` and ``trajectories/`` of a one-rank run the lengths of turns and the
seconds of update and sync. ``time`` adds those of an engine with the run's model, on an idle machine: of a
decoding step by how many sequences it decodes, and of a prefilled token. ``simulate`` draws whole groups of
trajectories for every rank and plays them: the rollout of each rank turn by turn, then a barrier, then the
update of the samples that ``batching.balance`` gives each rank, then the sync. Work grows with the ranks: the
groups of a rank stay as many. docs/results/scaling.md has the results and what the model leaves out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from simulation import Costs, Episode, Step, colocated, lognormal, rollout, split

RANKS = (1, 2, 4, 8, 16, 32, 64)
LATENCIES_S = (0.0, 0.2, 1.0)


@dataclass(kw_only=True, slots=True)
class Inputs:
    """What ``read`` and ``time`` found."""

    costs: Costs
    groups: list[list[Episode]]
    groups_per_rank: int
    slots: int
    rollout_s: float
    """Mean seconds of the run's rollouts, which the simulation of one rank should come near."""

    @classmethod
    def read(cls, path: Path) -> Inputs:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "step_s" not in record["costs"]:
            raise SystemExit(f"{path} holds no times of an engine: add them with `time`")
        return cls(
            costs=Costs(**record["costs"]),
            groups=[
                [
                    Episode(prompt=prompt, turns=tuple((s, a) for s, a in turns), trained=trained)
                    for prompt, turns, *_ in trajectories
                ]
                for trained, trajectories in record["groups"]
            ],
            groups_per_rank=record["groups_per_rank"],
            slots=record["slots"],
            rollout_s=record["rollout_s"],
        )

    def draw(self, ranks: int, seed: int) -> list[list[Episode]]:
        """Whole groups for every rank, with replacement."""
        rng = random.Random(seed)
        return [
            [episode for group in rng.choices(self.groups, k=self.groups_per_rank) for episode in group]
            for _ in range(ranks)
        ]


def mean_step(make: Callable[[int], Step], repeats: int) -> Step:
    """The mean of ``make(seed)``."""
    steps = [make(seed) for seed in range(repeats)]
    return Step(**{name: fmean(asdict(step)[name] for step in steps) for name in asdict(steps[0])})


def simulate(inputs: Inputs, repeats: int) -> None:
    """Print the tables."""
    costs, slots = inputs.costs, inputs.slots
    alone = fmean(
        rollout(inputs.draw(1, seed)[0], costs, lognormal(0.0, seed), slots=slots).seconds
        for seed in range(4 * repeats)
    )
    print(f"One rank's rollout without latency: simulated {alone:.1f} s, measured {inputs.rollout_s:.1f} s")
    for mean_s in LATENCIES_S:
        print(f"\nSearch latency {mean_s:g} s in the mean:\n")
        print(
            "| ranks | step s | idle | of it searching | of it waiting | idle, unbalanced "
            "| lock-step: step s | idle | ratio | split: training ranks | step s | ratio |"
        )
        print("|---" * 12 + "|")
        for ranks in RANKS:
            print(_row(inputs, ranks, mean_s, repeats))


def update_s(inputs: Inputs) -> float:
    """Mean seconds of one rank's update."""
    tokens = fmean(sum(episode.tokens for episode in group if episode.trained) for group in inputs.groups)
    return inputs.costs.update_s + inputs.costs.token_s * tokens * inputs.groups_per_rank


def _row(inputs: Inputs, ranks: int, mean_s: float, repeats: int) -> str:
    costs, slots = inputs.costs, inputs.slots

    def step(*, lock_step: bool = False, balanced: bool = True) -> Step:
        return mean_step(
            lambda seed: colocated(
                inputs.draw(ranks, seed),
                costs,
                lognormal(mean_s, seed),
                slots=slots,
                lock_step=lock_step,
                balanced=balanced,
            ),
            repeats,
        )

    def one_step_off(trainers: int) -> Step:
        return mean_step(
            lambda seed: split(
                inputs.draw(ranks, seed), costs, lognormal(mean_s, seed), slots=slots, trainers=trainers
            ),
            repeats,
        )

    best, unbalanced, locked = step(), step(balanced=False), step(lock_step=True)
    cells = [f"{best.seconds:.1f}", f"{best.idle:.3f}", f"{best.searching:.3f}", f"{best.waiting:.3f}"]
    cells += [f"{unbalanced.idle:.3f}"]
    cells += [f"{locked.seconds:.1f}", f"{locked.idle:.3f}", f"{locked.seconds / best.seconds:.2f}"]
    if ranks > 1:
        # Work is divided evenly where both sides take as long; a rank more or less either way.
        share = update_s(inputs) / (best.seconds - costs.sync_s)
        near = {min(max(round(share * ranks) + shift, 1), ranks - 1) for shift in (-1, 0, 1)}
        trainers, apart = min(((n, one_step_off(n)) for n in near), key=lambda pair: pair[1].seconds)
        cells += [str(trainers), f"{apart.seconds:.1f}", f"{apart.seconds / best.seconds:.2f}"]
    else:
        cells += ["-", "-", "-"]
    return f"| {ranks} | " + " | ".join(cells) + " |"


def read(run_dir: Path, last_steps: int) -> None:
    """Print what a run has recorded as JSON."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "time/step" in record]
    update_s, token_s = _line(
        [record["update/trained_tokens"] for record in records],
        [record["time/update"] + record["time/logprob"] for record in records],
    )
    paths = sorted((run_dir / "trajectories").glob("step-*.rank0.jsonl"))
    groups = [group for path in paths[-last_steps:] for group in _groups(path)]
    record = {
        "run": run_dir.name,
        "costs": {
            "update_s": round(update_s, 3),
            "token_s": round(token_s, 7),
            "sync_s": round(fmean(record["time/sync"] for record in records), 3),
        },
        "groups_per_rank": round(len(groups) / len(paths[-last_steps:])),
        "rollout_s": round(fmean(record["time/rollout"] for record in records), 2),
        "groups": groups,
    }
    print(json.dumps(record, separators=(",", ":")))


def time_engine(inputs: Path, policy: str) -> None:
    """Add an engine's times to the file."""
    record = json.loads(inputs.read_text(encoding="utf-8"))
    engine, record["slots"] = _engine(policy)
    record["costs"] |= {name: round(value, 7) for name, value in engine.items()}
    inputs.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")


def _groups(path: Path) -> list[list[Any]]:
    """Every group as [trained, trajectories]; these as [prompt, [[sampled, appended], …], parent, shared].

    Lengths are in tokens. ``trained`` is whether the rewards vary; ``shared`` how long a prefix the
    trajectory has in common with ``parent``, an earlier one of its group.
    """
    records: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records.setdefault(record["id"].partition("/")[0], []).append(record)
    groups = []
    for group in records.values():
        made: list[Any] = []
        for index, record in enumerate(group):
            (_, prompt), *runs = record["provenance"]
            # An invalid turn's reply follows as a run of its own, like an observation.
            sampled = [length for kind, length in runs if kind == "sampled"]
            appended = [length for kind, length in runs if kind != "sampled"] + [0]
            turns = [list(turn) for turn in zip(sampled, appended, strict=False)]
            shares = [prompt + _shared(record, turns, earlier) for earlier in group[:index]]
            shared = max(shares, default=0)
            made.append([prompt, turns, shares.index(shared) if shares else 0, shared])
        groups.append([len({record["reward"] for record in group}) > 1, made])
    return groups


def _shared(record: dict[str, Any], turns: Sequence[Sequence[int]], other: dict[str, Any]) -> int:
    """Tokens behind the prompt in which two trajectories agree; an observation counts whole or not at all."""
    total = 0
    for one, two, (sampled, appended) in zip(record["turns"], other["turns"], turns, strict=False):
        pairs = zip(one["token_ids"], two["token_ids"], strict=False)
        agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), min(sampled, len(two["token_ids"])))
        total += agreed
        if agreed < sampled or agreed < len(two["token_ids"]) or one["appended"] != two["appended"]:
            break
        total += appended
    return total


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Least squares: intercept and slope, neither of them negative."""
    mean_x, mean_y = fmean(xs), fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0
    slope = min(max(slope, 0.0), mean_y / mean_x)
    return mean_y - slope * mean_x, slope


def _engine(policy: str) -> tuple[dict[str, float], int]:
    """Costs of decoding and prefill on an idle engine, and how many sequences it decodes together."""
    import asyncio
    import time

    from policies import POLICIES, warm_start

    from searchrl.compose import load_config
    from searchrl.engine import GenerationRequest
    from searchrl.environment import prepare_environment
    from searchrl.setup import open_run

    cfg, _ = load_config([*POLICIES[policy], f"checkpoint={warm_start(policy)}"])
    prepare_environment("cpu")
    rng = random.Random(0)
    prompt_tokens, new_tokens = 128, 33

    with open_run(cfg) as run:

        def seconds(sequences: int, max_tokens: int) -> float:
            """Fresh prompts, so that nothing comes from the prefix cache."""
            requests = [
                GenerationRequest(
                    prompt_ids=[rng.randrange(300, 40000) for _ in range(prompt_tokens)],
                    max_tokens=max_tokens,
                    temperature=1.0,
                    top_p=1.0,
                    top_k=0,
                    seed=index,
                    stop=("<never>",),
                    ignore_eos=True,
                )
                for index in range(sequences)
            ]

            async def generate() -> None:
                await asyncio.gather(*(run.engine.generate(request) for request in requests))

            start = time.perf_counter()
            run.env.runner.run(generate())
            return time.perf_counter() - start

        seconds(8, 4)  # what is made at first use
        points = [(n, seconds(n, 1), seconds(n, new_tokens)) for n in (1, 4, 16, 32, 64) for _ in range(2)]
    step_s, sequence_s = _line(
        [n for n, _, _ in points], [(whole - first) / (new_tokens - 1) for _, first, whole in points]
    )
    prefilled = [(first - step_s - sequence_s * n) / (n * prompt_tokens) for n, first, _ in points if n >= 16]
    engine = {"step_s": step_s, "sequence_s": sequence_s, "prefill_s": fmean(prefilled)}
    return engine, cfg.engine.max_num_seqs


def main() -> None:
    """Read, time or simulate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("read", help="print what a run has recorded")
    reading.add_argument("run", type=Path, help="folder of a one-rank run")
    reading.add_argument("--last-steps", type=int, default=8, help="steps whose trajectories are kept")
    timing = commands.add_parser("time", help="add the times of an idle engine")
    timing.add_argument("inputs", type=Path)
    timing.add_argument("--policy", default="smollm2", help="whose engine is timed: the run's")
    simulating = commands.add_parser("simulate", help="print the tables")
    simulating.add_argument("inputs", type=Path)
    simulating.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    if args.command == "read":
        read(args.run, args.last_steps)
    elif args.command == "time":
        time_engine(args.inputs, args.policy)
    else:
        simulate(Inputs.read(args.inputs), args.repeats)


if __name__ == "__main__":
    main()
