"""The update's forward and backward passes: packed against padded, the head at loss positions or everywhere.

    python benchmarks/update/packing.py --groups 2 --rounds 2

Trajectories have the lengths and the shared prefixes of a real run (``scale_inputs.json``) and random tokens;
the network is SmolLM2-135M in fp32. Every pass is made in a process of its own, which reports seconds and its
peak resident memory above what stood there before (weights and their gradients); kinds alternate. No
optimizer step: it is the same for all.

On a GPU, where a process can forget a peak, one process makes all passes, of random weights in bf16:

    python benchmarks/update/packing.py --device cuda --shape 3B --groups 8 --rounds 3 --max-tokens 4096
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from policies import random_network

if TYPE_CHECKING:
    from searchrl.batching import MicroBatch
    from searchrl.trajectory import Sample

INPUTS = Path(__file__).resolve().parents[1] / "scale_inputs.json"


@dataclass(kw_only=True, slots=True, frozen=True)
class Kind:
    """One way to make the passes."""

    layout: str
    """``tree``: packed, shared prefixes once. ``packed``. ``sorted``: padded, similar lengths together, in
    the same budget of tokens. ``padded``: as they come, eight a micro-batch."""
    everywhere: bool = False
    """The head gives logits at all positions, not only where there is loss."""


KINDS: dict[str, Kind] = {
    "packed, prefixes shared": Kind(layout="tree"),
    "packed": Kind(layout="packed"),
    "padded, sorted by length": Kind(layout="sorted"),
    "padded, as they come": Kind(layout="padded"),
    "padded, as they come, head everywhere": Kind(layout="padded", everywhere=True),
}


def make_samples(groups: Sequence[Any], vocabulary: int) -> list[Sample]:
    """Random tokens; a trajectory repeats as many of an earlier one of its group as it did in the run."""
    from searchrl.trajectory import Finish, Outcome, Sample, Trajectory, Turn

    rng = random.Random(0)
    samples = []
    for number, (_, group) in enumerate(groups):
        streams: list[list[int]] = []
        for index, (prompt, turns, parent, shared) in enumerate(group):
            length = prompt + sum(map(sum, turns))
            stream = streams[parent][:shared] if shared else []
            stream = stream + [rng.randrange(300, vocabulary) for _ in range(length - len(stream))]
            streams.append(stream)
            position, made = prompt, []
            for sampled, appended in turns:
                end = position + sampled
                made.append(
                    Turn(
                        token_ids=stream[position:end],
                        logprobs=[0.0] * sampled,
                        text="",
                        finish=Finish.STOP,
                        policy_version=0,
                        observation_ids=stream[end : end + appended],
                    )
                )
                position = end + appended
            trajectory = Trajectory(
                prompt_ids=stream[:prompt], turns=made, outcome=Outcome.ANSWERED, answer=None
            )
            samples.append(Sample(trajectory=trajectory, advantage=1.0, id=f"{number}/{index}"))
    return samples


def make_batches(kind: Kind, samples: Sequence[Sample], max_tokens: int) -> list[MicroBatch]:
    from searchrl.batching import pack, pad

    match kind.layout:
        case "tree":
            return pack(samples, max_tokens)
        case "packed":
            return pack(samples, max_tokens, share_prefixes=False)
        case "sorted":
            return pad(samples, max_tokens)
        case _:  # a budget that eight rows of any length keep within
            return [
                batch
                for start in range(0, len(samples), 8)
                for batch in pad(samples[start : start + 8], 2**30)
            ]


def passes(policy: Any, batches: Sequence[MicroBatch], kind: Kind) -> None:
    """Forward and backward over all micro-batches."""
    from searchrl.policy import token_outputs

    for batch in batches:
        if kind.everywhere:
            logits = policy.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits
            everywhere = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
            logprobs = everywhere[batch.loss_mask[:, 1:]]
        else:
            logprobs = token_outputs(policy, batch).logprobs
        logprobs.sum().backward()


def random_policy(shape: str) -> Any:
    """A Qwen2.5 of that size on the GPU, in bf16."""
    from searchrl.attention import ALONG_PATHS
    from searchrl.model_shape import KNOWN_SHAPES
    from searchrl.policy import PolicyModel

    sizes = KNOWN_SHAPES[f"Qwen/Qwen2.5-{shape}"]
    network = random_network(sizes, "cuda", attn_implementation=ALONG_PATHS)
    return PolicyModel(network, temperature=1.0, chunk_size=1024)


def measure_on_gpu(
    shape: str, groups: int, rounds: int, max_tokens: int
) -> dict[str, list[dict[str, float]]]:
    """All kinds in turn, after one round that warms up."""
    import torch

    policy = random_policy(shape)
    record = json.loads(INPUTS.read_text(encoding="utf-8"))
    samples = make_samples(record["groups"][:groups], policy.model.config.vocab_size)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in KINDS}
    for number in range(1 + rounds):
        for name, kind in KINDS.items():
            batches = [batch.to("cuda") for batch in make_batches(kind, samples, max_tokens)]
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            try:
                passes(policy, batches, kind)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            except torch.cuda.OutOfMemoryError:
                seconds = math.inf
            peak = torch.cuda.max_memory_allocated()
            if number:
                found[name].append(summary(seconds, peak - before, batches, samples, gflops=math.nan))
            del batches
            torch.cuda.empty_cache()
    return found


def summary(
    seconds: float, peak: int, batches: Sequence[MicroBatch], samples: Sequence[Sample], gflops: float
) -> dict[str, float]:
    """What is reported of one kind's passes; ``peak`` in bytes."""
    return {
        "seconds": seconds,
        "mib": peak / 2**20,
        "tokens": sum(len(sample.trajectory.token_ids) for sample in samples),
        "loss_tokens": sum(sample.trajectory.num_sampled for sample in samples),
        "computed": sum((b if b.tree is None else b.tree).input_ids.numel() for b in batches),
        "gflops": gflops,
    }


def measure(kind: Kind, groups: int, max_tokens: int) -> dict[str, float]:
    """One kind's passes in this process."""
    from searchrl.environment import matmul_gflops, prepare_environment

    prepare_environment("cpu")

    import torch

    from searchrl.config import DType, ModelConfig
    from searchrl.models import resolve_model
    from searchrl.policy import PolicyModel, load_model

    path = resolve_model("package:smollm2-135m", Path("assets"))
    network = load_model(path, ModelConfig(dtype=DType.float32))
    policy = PolicyModel(network, temperature=1.0, chunk_size=128)
    record = json.loads(INPUTS.read_text(encoding="utf-8"))
    samples = make_samples(record["groups"][:groups], network.config.vocab_size)
    batches = make_batches(kind, samples, max_tokens)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)  # touched, so resident
    gflops = matmul_gflops()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    passes(policy, batches, kind)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return summary(seconds, (peak - before) * 1024, batches, samples, gflops)


def main() -> None:
    """Measure all kinds in turn and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=2, help="of eight trajectories")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=512, help="of a packed row")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--shape", choices=["0.5B", "3B", "7B"], default="0.5B", help="of the policy on a GPU"
    )
    parser.add_argument("--kind", choices=list(KINDS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind is not None:
        print(json.dumps(measure(KINDS[args.kind], args.groups, args.max_tokens)))
        return
    if args.device == "cuda":
        found = measure_on_gpu(args.shape, args.groups, args.rounds, args.max_tokens)
    else:
        found = {kind: [] for kind in KINDS}
        for _ in range(args.rounds):
            for kind, results in found.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
                finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results.append(json.loads(finished.stdout))
    baseline = found["padded, as they come, head everywhere"]
    print("| pass | positions computed | s | tokens/s | ratio | peak MiB | GFLOP/s |\n" + "|---" * 7 + "|")
    for kind, results in found.items():
        seconds = median(result["seconds"] for result in results)
        tokens, computed = results[0]["tokens"], results[0]["computed"]
        ratios = [slow["seconds"] / ours["seconds"] for slow, ours in zip(baseline, results, strict=True)]
        print(
            f"| {kind} | {computed:.0f} | {seconds:.1f} | {tokens / seconds:.0f} | {median(ratios):.2f} "
            f"| {median(result['mib'] for result in results):.0f} "
            f"| {median(result['gflops'] for result in results):.0f} |"
        )
    first = baseline[0]
    print(f"trajectories of {first['tokens']:.0f} tokens, {first['loss_tokens']:.0f} of them sampled")


if __name__ == "__main__":
    main()
