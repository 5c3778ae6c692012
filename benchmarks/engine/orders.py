"""What it costs that the ranks of a tensor-parallel engine agree on requests before each of its steps.

    torchrun --nproc-per-node 2 benchmarks/engine/orders.py

Per step: milliseconds of the exchange alone, without the step, between processes of one machine.
"""

from __future__ import annotations

import time
from statistics import median, quantiles

import torch.distributed as dist

from searchrl.distributed import gather_objects, init_world, side_group
from searchrl.engine import GenerationRequest
from searchrl.engine.team import Orders

ROUNDS = 500
CASES = {"nothing to tell": (0, 0), "1 new prompt of 1,000 tokens": (1, 1000), "64 of them": (64, 1000)}


def orders(count: int, tokens: int) -> Orders:
    """So many new requests."""
    request = GenerationRequest(
        prompt_ids=[151_000 + n % 900 for n in range(tokens)],
        max_tokens=512,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        seed=1,
    )
    return Orders(add=[(str(n), request) for n in range(count)])


def main() -> None:
    """Measure every case and print a table."""
    world = init_world("cpu")
    dist.init_process_group("gloo")
    group = side_group(world.size)
    for name, (count, tokens) in CASES.items():
        mine = orders(count, tokens) if world.is_main else None
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            gather_objects((mine, []), group)
            times.append(1000 * (time.perf_counter() - start))
        if world.is_main:
            print(
                f"{name:<30} median {median(times):6.2f} ms, 99 % below {quantiles(times, n=100)[98]:6.2f} ms"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
