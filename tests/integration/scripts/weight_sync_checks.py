"""Syncs a real actor into a real engine, whole and damaged: ``weight_sync_checks OUT MODEL ZERO_STAGE``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

import searchrl.engine
from integration.scripts.common import probe_prompts, random_samples, write_results
from searchrl.actor import Actor, init_communication
from searchrl.batching import count_loss_tokens, pack
from searchrl.config import DType, EngineConfig, ModelConfig, OptimizerConfig, SyncConfig
from searchrl.distributed import World, init_world
from searchrl.engine import Engine
from searchrl.policy import TokenOutputs
from searchrl.weight_sync import SyncError, Weights, WeightSync

Tamper = Callable[[Weights], Weights]
MLP = "model.layers.1.mlp.down_proj.weight"


def keep(weights: Weights) -> Weights:
    """No damage."""
    return weights


def damaged(name: str, damage: Callable[[Tensor], Tensor]) -> Tamper:
    """Replaces one tensor on its way."""

    def tamper(weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in weights:
            yield key, damage(tensor.clone()) if key == name else tensor

    return tamper


def without(name: str) -> Tamper:
    """Leaves one tensor out."""

    def tamper(weights: Weights) -> Iterator[tuple[str, Tensor]]:
        yield from ((key, tensor) for key, tensor in weights if key != name)

    return tamper


def noise(tensor: Tensor) -> Tensor:
    """A fifth of the tensor's own scale on top."""
    return tensor + 0.2 * tensor.std() * torch.randn_like(tensor)


def one_bit(tensor: Tensor) -> Tensor:
    """The last bit of one element: far below what the probe can see."""
    tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    return tensor


def one_nan(tensor: Tensor) -> Tensor:
    """A single element that is not a number."""
    tensor.view(-1)[tensor.numel() // 2] = float("nan")
    return tensor


@dataclass(slots=True)
class Bench:
    """Actor, engine and what joins them."""

    world: World
    actor: Actor
    engine: Engine
    sync: WeightSync
    runner: asyncio.Runner
    step: int = 0

    def train(self) -> None:
        """One optimizer step that makes random tokens likelier; moves every tensor by about the rate."""
        samples = random_samples(self.step, 8)

        def loss(outputs: TokenOutputs) -> Tensor:
            return -outputs.logprobs.sum()

        batches = pack(samples, 256)
        self.actor.update(batches, loss, denominator=count_loss_tokens(samples), step=self.step)
        self.step += 1

    def outcome(self, tamper: Tamper = keep) -> dict[str, object]:
        """What a sync says."""
        try:
            stats = self.sync(self.runner, version=self.step, tamper=tamper)
        except SyncError as error:
            return {"error": str(error)}
        return {**stats.metrics(), "version": self.engine.policy_version}

    def fault(
        self, tamper: Tamper = keep, injected: AbstractContextManager[object] | None = None
    ) -> dict[str, object]:
        """Train, sync with a fault, then sync without: what each says."""
        self.train()
        with injected or nullcontext():
            broken = self.outcome(tamper)
        return {"broken": broken, "repaired": self.outcome()}


def checksum(bench: Bench) -> dict[str, object]:
    """What comparing tensors says of small and large faults, the first of which the probe lets pass."""
    faults: dict[str, Tamper] = {
        "one bit": damaged(MLP, one_bit),
        "one bit of a part of a fused matrix": damaged("model.layers.0.self_attn.k_proj.weight", one_bit),
        "one bit of a norm": damaged("model.norm.weight", one_bit),
        "one bit of the embedding": damaged("model.embed_tokens.weight", one_bit),
        "skipped": without("model.layers.1.mlp.up_proj.weight"),
    }
    seen: dict[str, object] = {"probe alone": [bench.outcome(fault) for fault in list(faults.values())[:4]]}
    proved, bench.sync.config = bench.sync.config, replace(bench.sync.config, checksum=True)
    for name, fault in faults.items():
        seen[name] = bench.fault(fault)
    with patch.object(searchrl.engine, "_refresh_tied_head", lambda model: None):
        bench.train()
        seen["stale head"] = bench.outcome()
    seen["no fault"] = bench.outcome()
    bench.sync.config = proved
    return seen


def build(
    model: Path, zero_stage: int, *, device: str = "cpu", dtype: DType = DType.float32, engine_size: int = 1
) -> Bench:
    """The real parts."""
    world = init_world(device, engine_size=engine_size)
    init_communication(world)
    model_config = ModelConfig(path=str(model), dtype=dtype)
    temperature = 0.7
    actor = Actor(
        model,
        model=model_config,
        optimizer=OptimizerConfig(lr=5e-3),
        zero_stage=zero_stage,
        temperature=temperature,
        logprob_chunk=64,
        total_steps=100,
        seed=0,
        world=world,
    )
    engine = Engine(
        model,
        EngineConfig(max_num_seqs=8, kv_cache_gib=0.0625),
        dtype=dtype,
        max_context_tokens=512,
        seed=0,
        world=world,
    )
    sync = WeightSync(
        actor=actor,
        engine=engine,
        config=SyncConfig(probe_max_abs_diff=1e-3 if dtype is DType.float32 else 0.1),
        temperature=temperature,
        prompts=probe_prompts([40, 70, 100]),
    )
    return Bench(world=world, actor=actor, engine=engine, sync=sync, runner=asyncio.Runner())


def synced(bench: Bench) -> dict[str, object]:
    """Weights, whole and damaged."""
    results: dict[str, object] = {"start": bench.outcome()}
    bench.train()
    try:
        bench.sync.probe(bench.runner)
    except SyncError as error:
        results["before the sync"] = {"error": str(error)}
    results["after the sync"] = bench.outcome()
    results["corrupted tensor"] = bench.fault(damaged(MLP, noise))
    stale_head = patch.object(searchrl.engine, "_refresh_tied_head", lambda model: None)
    results["stale head"] = bench.fault(injected=stale_head)
    return results


def main(out: Path, model: Path, zero_stage: int) -> None:
    """Run all checks."""
    bench = build(model, zero_stage)
    results = synced(bench)
    results["skipped tensor"] = bench.fault(without(MLP))
    results["skipped head"] = bench.fault(without("lm_head.weight"))
    results["not a number"] = bench.fault(damaged(MLP, one_nan))
    results["checksum"] = checksum(bench)
    stale_cache = patch.object(bench.engine, "reset_prefix_cache", lambda: None)
    results["stale cache"] = bench.fault(injected=stale_cache)
    write_results(out, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
