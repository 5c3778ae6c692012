"""Memory and time of the log-probability pass at a vocabulary of 151,936: our chunks against full logits.

    python benchmarks/update/head.py --tokens 1024 --hidden 896

Forward and backward of the head alone, fp32, each in a process of its own that reports its peak
resident memory above what stood there before (weight, its gradient's space, hidden states); interleaved.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

VOCABULARY = 151_936


def measure(kind: str, tokens: int, hidden: int, chunk: int, device: str) -> dict[str, float]:
    """Peak MiB above the inputs and seconds of one pass, in this process."""
    import torch

    from searchrl.algorithm.logprobs import chunked_logprobs

    torch.manual_seed(0)
    like: dict[str, Any] = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    states = torch.randn(tokens, hidden, **like).requires_grad_()
    weight = (torch.randn(VOCABULARY, hidden, **like) * 0.02).requires_grad_()
    weight.grad, states.grad = torch.zeros_like(weight), torch.zeros_like(states)  # touched, so resident
    targets = torch.randint(VOCABULARY, (tokens,), device=device)

    def full() -> None:
        logprobs = (states @ weight.t()).float().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1).detach()
        (logprobs.gather(1, targets[:, None]).sum() + entropy.sum()).backward()

    def chunked() -> None:
        logprobs, entropy = chunked_logprobs(states, weight, None, targets, 1.0, chunk)
        (logprobs.sum() + entropy.detach().sum()).backward()

    passes: dict[str, Callable[[], None]] = {"full": full, "chunked": chunked}
    if device == "cuda":
        passes[kind]()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        passes[kind]()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {"mib": (torch.cuda.max_memory_allocated() - held) / 2**20, "seconds": seconds}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    passes[kind]()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mib": (peak - before) / 1024, "seconds": seconds}


def main() -> None:
    """Measure both kinds in turn and print the medians and their ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--kind", choices=["full", "chunked"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind is not None:
        print(json.dumps(measure(args.kind, args.tokens, args.hidden, args.chunk, args.device)))
        return
    found: dict[str, list[dict[str, float]]] = {"full": [], "chunked": []}
    for _ in range(args.rounds):
        for kind, results in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind]
            finished = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(finished.stdout))
    print("| pass | peak above its inputs, MiB | seconds |\n|---|---|---|")
    values = {
        kind: {key: median(result[key] for result in results) for key in ("mib", "seconds")}
        for kind, results in found.items()
    }
    for kind, measured in values.items():
        print(f"| {kind} | {measured['mib']:.0f} | {measured['seconds']:.3f} |")
    full, ours = values["full"], values["chunked"]
    print(f"| ratio | {full['mib'] / ours['mib']:.1f} | {full['seconds'] / ours['seconds']:.2f} |")


if __name__ == "__main__":
    main()
