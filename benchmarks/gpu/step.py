"""Whole steps of a large policy on the GPUs of this machine: seconds and memory of each phase, rates, probe.

    searchrl data worldfacts
    python benchmarks/gpu/step.py --shape 3B --out bench/gpu

The policy has the shape of a Qwen2.5 and random weights, whose episodes all run into their token limit, so
its work is known exactly: no search happens, and the reward is noise. What is measured is ``searchrl train``
as a user runs it. The first step, which compiles, is left out.

Model FLOPs of an update are counted on trajectories as they stand, whatever the trainer really computes:
6 per weight and token, the head only where there is loss, and 6 · layers · width · length² of causal
attention for each trajectory (PaLM, arXiv 2204.02311, appendix B, without the upper triangle).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parents[1]))
from policies import random_network

from searchrl.model_shape import KNOWN_SHAPES, ModelShape
from searchrl.models import resolve_model

BENCHMARKS = Path(__file__).resolve().parent
SHAPES = {
    "tiny": KNOWN_SHAPES["random:tiny"],
    "0.5B": KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"],
    "3B": KNOWN_SHAPES["Qwen/Qwen2.5-3B"],
    "7B": KNOWN_SHAPES["Qwen/Qwen2.5-7B"],
}
PHASES = ("rollout", "swap", "logprob", "update", "sync")


def build(shape: ModelShape, folder: Path, device: str) -> None:
    """A checkpoint of random weights in bf16, with the tokenizer of ``random:tiny``."""
    import torch

    tiny = resolve_model("random:tiny", Path("assets"))
    shutil.copytree(
        tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "searchrl.json")
    )
    torch.manual_seed(0)
    random_network(shape, device, max_position_embeddings=32_768).save_pretrained(folder)


def matmul_tflops(device: str) -> float:
    """Of an 8192 × 8192 × 8192 product in bf16: what the device gives at best. 0 on a CPU."""
    import torch

    if device == "cpu":
        return 0.0
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(15):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * 8192**3 / median(seconds) / 1e12


def train(folder: Path, out: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Run ``searchrl train``; the metrics of its steps."""
    settings = [
        "+experiment=smoke",
        "warmstart.demonstrations=0",
        f"checkpoint={folder}",
        f"run_dir={out}/run",
        f"device={args.device}",
        "model.dtype=bfloat16",
        f"steps={args.steps}",
        f"groups_per_step={args.groups}",
        "group_size=8",
        "sampling.temperature=1.0",
        f"episode.max_turn_tokens={args.turn_tokens}",
        f"episode.max_context_tokens={2 * args.turn_tokens + 512}",
        "engine.max_num_seqs=256",
        "engine.kv_cache_gib=8" if args.device == "cuda" else "engine.kv_cache_gib=0.5",
        "reward=em",
        "reward.kind=custom",
        "reward.import_path=noise:parity",
        "loss.kl_coef=0",
        "optimizer.lr=1e-6",
        "sync.probe_max_abs_diff=1.0",
        "eval.before=false",
        "eval.questions=8",
        *args.settings,
    ]
    command = [sys.executable, "-m", "searchrl.cli", "train", *settings]
    path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])  # where the reward is
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    records = (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, records) if "time/step" in record]


def update_flops(shape: ModelShape, record: dict[str, float], trajectories: int) -> float:
    """Model FLOPs of forward and backward, see above."""
    tokens = record["update/trained_tokens"]
    sampled = record["rollout/sampled_tokens"] * trajectories
    weights = shape.layers * sum(rows * columns for rows, columns in shape.linear_layers.values())
    attention = shape.layers * shape.heads * shape.head_dim * tokens * (tokens / trajectories)
    return 6 * (weights * tokens + shape.vocabulary * shape.hidden * sampled + attention)


def report(shape: ModelShape, records: list[dict[str, float]], trajectories: int, tflops: float) -> None:
    """Print medians over the steps after the first."""
    steps = records[1:]

    def middle(name: str) -> float:
        return median(step[name] for step in steps)

    print("| phase | s | share | peak GiB |\n|---|---|---|---|")
    for phase in PHASES:
        seconds, peak = middle(f"time/{phase}"), middle(f"memory/{phase}_peak_gib")
        print(f"| {phase} | {seconds:.2f} | {seconds / middle('time/step'):.1%} | {peak:.1f} |")
    sampled = [step["rollout/sampled_tokens"] * trajectories / step["time/rollout_span"] for step in steps]
    trained = [step["update/trained_tokens"] / step["time/update"] for step in steps]
    rates = [update_flops(shape, step, trajectories) / step["time/update"] / 1e12 for step in steps]
    probes = [record["sync/probe_max_abs_diff"] for record in records]
    print(f"\nstep: {middle('time/step'):.1f} s, {trajectories / middle('time/step'):.1f} trajectories/s")
    print(f"engine: {median(sampled):,.0f} sampled tokens/s")
    share = f", {median(rates) / tflops:.0%} of a large matrix product ({tflops:.0f})" if tflops else ""
    print(f"update: {median(trained):,.0f} tokens/s, {median(rates):.3g} model TFLOP/s{share}")
    print(
        f"sync: {middle('sync/seconds'):.2f} s ({middle('sync/load_seconds'):.2f} s to load "
        f"{middle('sync/megabytes'):,.0f} MB, {middle('sync/probe_seconds'):.2f} s to probe)"
    )
    print(f"probe: {min(probes):.2g} to {max(probes):.2g} nats over {len(probes)} syncs")


def main() -> None:
    """Build, train, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="3B")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--groups", type=int, default=32, help="of eight trajectories")
    parser.add_argument("--turn-tokens", type=int, default=512)
    parser.add_argument("settings", nargs="*", help="further Hydra overrides")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    args.out.mkdir(parents=True)
    # In a process of its own: what it held of the GPU would be missing for the run.
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        other.submit(build, shape, args.out / "model", args.device).result()
        tflops = other.submit(matmul_tflops, args.device).result()
    records = train(args.out / "model", args.out, args)
    report(shape, records, 8 * args.groups, tflops)


if __name__ == "__main__":
    main()
