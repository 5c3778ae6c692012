"""Memory that really runs out in a micro-batch, and the step that is made all the same; by ``update_checks``.

A hook in a layer asks for more than its process may have, in the second micro-batch: a real failure of the
allocator at a known place, when there are gradients to forget. The limit is a little above what is in use: on
a CPU one on the process's address space, on a GPU one on what the allocator may take. On two ranks only the
last is limited, so that the other has to learn of it.
``oom_checks OUT MODEL DEVICE`` runs alone, on a GPU as well.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from integration.scripts.common import random_samples, write_results
from searchrl.actor import Actor, init_communication
from searchrl.config import BatchingConfig, Config, DType, ModelConfig, OptimizerConfig
from searchrl.distributed import World, gather_objects, init_world
from searchrl.out_of_memory import TokenBudget
from searchrl.update import apply_update, prepare_update

SAMPLES = random_samples(5, 100)
BUDGET = 2500
"""Tokens of one micro-batch: about half of all."""
HUNGER = 4 * 2**20
"""Bytes that a layer asks for, for every token of any but the first micro-batch; it never touches them."""
ROOM = 7 * 2**29
"""Bytes that a limited process may allocate above what it has. ZeRO's bucket takes 2 GB of them."""


def limit(room: int | None, device: str) -> None:
    """Allow so many bytes more than are in use; None: any number."""
    if device != "cpu":
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info(device)[1]
        share = 1.0 if room is None else (torch.cuda.memory_reserved(device) + room) / total
        torch.cuda.set_per_process_memory_fraction(share, device)
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (most if room is None else pages * resource.getpagesize() + room, most)
    )


def make_hungry(layer: nn.Module, where: str, world: World) -> None:
    """Let the layer allocate in that pass; in the backward pass, those above it have gradients by then."""
    first = True

    def eat(_: nn.Module, tensors: Any) -> None:
        nonlocal first
        tokens = tensors[0].shape[:-1].numel()
        torch.empty(0 if first else tokens * HUNGER, dtype=torch.uint8, device=world.device)
        first = False

    if where == "forward":
        layer.register_forward_pre_hook(eat)
    else:
        layer.register_full_backward_pre_hook(eat)


def trained(
    model: Path, stage: int, world: World, budget: TokenBudget, where: str, *, is_limited: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and metrics after one optimizer step with a layer that is hungry in that pass."""
    actor = Actor(
        model,
        model=ModelConfig(path=str(model), dtype=DType.float32),
        optimizer=OptimizerConfig(lr=1e-3),
        zero_stage=stage,
        temperature=1.0,
        logprob_chunk=256,
        total_steps=1,
        seed=0,
        world=world,
    )
    make_hungry(actor.network.model.layers[0], where, world)
    cfg = Config(batching=BatchingConfig(max_tokens=budget.tokens, packing=False))
    mine = SAMPLES[world.rank :: world.size]
    update = prepare_update(actor, None, mine, cfg=cfg, world=world, budget=budget)
    if is_limited:
        limit(ROOM, world.device)
    metrics = apply_update(update, actor, epochs=1, step=0)
    limit(None, world.device)
    return {name: weight.clone() for name, weight in actor.named_weights()}, metrics


def compared(model: Path, stage: int, where: str, world: World) -> dict[str, float]:
    """A step that memory ran out in, against one that had less to do at a time from the start."""
    said: list[str] = []
    budget = TokenBudget(tokens=BUDGET // world.size, say=said.append)
    last = world.rank == world.size - 1
    weights, metrics = trained(model, stage, world, budget, where, is_limited=last)
    assert len(set(gather_objects(budget.tokens))) == 1, "all ranks go on with the same budget"
    retries = metrics.pop("update/oom_retries")
    assert len(said) == retries
    less = TokenBudget(tokens=budget.tokens)
    calm, expected = trained(model, stage, world, less, where, is_limited=False)
    assert expected.pop("update/oom_retries") == 0
    assert metrics.keys() == expected.keys()
    return {
        "retries": retries,
        "budget": float(budget.tokens),
        "weights": max(float((weights[name] - calm[name]).abs().max()) for name in calm),
        "metrics": max(abs(metrics[name] - expected[name]) for name in expected),
    }


def cases(world: World) -> Iterator[tuple[int, str]]:
    for stage in (0, 1, 2):
        yield stage, "forward"
        if stage < 2 or world.size == 1:  # inside ZeRO-2's backward pass other ranks cannot learn of it
            yield stage, "backward"


def check(model: Path, world: World) -> dict[str, dict[str, float]]:
    """Every case on all ranks."""
    return {f"{where}/zero{stage}": compared(model, stage, where, world) for stage, where in cases(world)}


def main(out: Path, model: Path, device: str) -> None:
    """Check alone."""
    world = init_world(device)
    init_communication(world)
    write_results(out, check(model, world))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
