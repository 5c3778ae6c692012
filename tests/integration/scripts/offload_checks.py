"""Updates with and without a stay on the host in between, and ZeRO-3's buckets; run by ``update_checks``."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import searchrl.actor
from integration.scripts.common import random_samples
from searchrl.actor import Actor, OffloadedError
from searchrl.batching import balance, count_loss_tokens, pack
from searchrl.config import DType, ModelConfig, OptimizerConfig
from searchrl.distributed import World, gather_objects
from searchrl.policy import TokenOutputs
from searchrl.zero import deepspeed_config

CASES = {
    "zero0": (0, DType.float32),
    "zero1": (1, DType.bfloat16),
    "zero2": (2, DType.bfloat16),
    "zero3": (3, DType.bfloat16),
    "zero3/fp32": (3, DType.float32),
}
SMALL_BUCKET = 6000
"""Elements: a layer of the tiny model spans several buckets, and none holds its largest tensor."""


class Bench:
    """One actor and what happened to it."""

    def __init__(self, model: Path, stage: int, dtype: DType, world: World, *, offloads: bool) -> None:
        self.events: list[dict[str, Any]] = []
        self.world = world
        self.actor = Actor(
            model,
            model=ModelConfig(path=str(model), dtype=dtype),
            optimizer=OptimizerConfig(lr=1e-2),
            zero_stage=stage,
            temperature=1.0,
            logprob_chunk=64,
            total_steps=10,
            seed=0,
            world=world,
            offloads=offloads,
            events=lambda event, **details: self.events.append({"event": event, **details}),
        )

    def update(self, step: int) -> None:
        """Make random tokens likelier."""
        samples = random_samples(step, 4)
        batches = pack(balance(samples, self.world.size)[self.world.rank], 256)
        self.actor.update(batches, loss_sum, denominator=count_loss_tokens(samples), step=step)

    def weights(self) -> dict[str, Tensor]:
        """Copies."""
        return {name: tensor.clone() for name, tensor in self.actor.named_weights()}


def loss_sum(outputs: TokenOutputs) -> Tensor:
    """Cross entropy."""
    return -outputs.logprobs.sum()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def check_offload(model: Path, stage: int, dtype: DType, world: World) -> dict[str, Any]:
    """Three updates; the other actor's states leave after the first and come back before the second."""
    plain, moved = (Bench(model, stage, dtype, world, offloads=offloads) for offloads in (False, True))
    for bench in (plain, moved):
        bench.update(0)
        bench.actor.offload()
    batches = pack(random_samples(9, 2), 256)
    scores = [torch.cat(bench.actor.logprobs(batches)) for bench in (plain, moved)]
    result: dict[str, Any] = {
        "scores meanwhile": torch.equal(*scores),
        "weights meanwhile": same(plain.weights(), moved.weights()),
        "refused": [],
    }
    for needs_states in (
        lambda: moved.update(1),
        moved.actor.first_moments,
        lambda: moved.actor.save(model),
    ):
        try:
            needs_states()
        except OffloadedError as refusal:
            result["refused"].append(str(refusal))
    before = moved.weights()
    for bench in (plain, moved):
        bench.actor.reload()
        bench.update(1)
        bench.update(2)
    result["weights after"] = same(plain.weights(), moved.weights())
    result["moments after"] = same(plain.actor.first_moments(), moved.actor.first_moments())
    result["an update matters"] = not same(before, moved.weights())
    result["noop"] = [event["noop"] for event in plain.events + moved.events]
    elements = sum(tensor.numel() for tensor in before.values())
    shares = 1 if stage == 0 else world.size  # without ZeRO every rank has everything
    host_bytes = gather_objects(moved.events[0]["host_bytes"])
    result["bytes per element"] = sum(host_bytes) / world.size * shares / elements
    assert all(other == result for other in gather_objects(result)), "the ranks disagree"
    return result


def check_buckets(model: Path, world: World) -> dict[str, Any]:
    """Weights through many small buckets, held together as vLLM holds those of a layer, against one."""
    with patch.object(searchrl.actor, "deepspeed_config", nothing_persists):
        actor = Bench(model, 3, DType.float32, world, offloads=False).actor
    whole = {name: tensor.clone() for name, tensor in actor.named_weights()}
    held: dict[str, Tensor] = {}
    most = 0
    with patch.object(searchrl.actor, "SYNC_BUCKET_ELEMENTS", SMALL_BUCKET):
        for name, tensor in actor.named_weights():
            held[name] = tensor
            most = max(most, sum(parameter.numel() for parameter in actor.network.parameters()))
    return {
        "same": same(whole, held),
        "order": list(whole) == list(held),
        "most gathered": most,
        "largest": max(tensor.numel() for tensor in whole.values()),
        "elements": sum(tensor.numel() for tensor in whole.values()),
    }


def nothing_persists(*args: Any) -> dict[str, Any]:
    """ZeRO-3 keeps small parameters whole on every rank: here not even those."""
    config = deepspeed_config(*args)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def check(model: Path, world: World) -> dict[str, Any]:
    """Every case on all ranks."""
    results = {name: check_offload(model, *case, world) for name, case in CASES.items()}
    results["buckets"] = check_buckets(model, world)
    return results
