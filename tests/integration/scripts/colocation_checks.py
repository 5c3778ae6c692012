"""Engine and actor take turns on one GPU: ``colocation_checks OUT TINY``. Writes memory in use at each turn.

The model is TINY made wide: what moves must stand out from what CUDA and its libraries hold.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from integration.scripts.common import probe_prompts, random_samples, write_results
from searchrl.actor import Actor, init_communication
from searchrl.batching import count_loss_tokens, pack
from searchrl.config import EngineConfig, ModelConfig, OptimizerConfig, SyncConfig
from searchrl.distributed import World, init_world
from searchrl.engine import Engine
from searchrl.phases import GIB, Phases
from searchrl.policy import TokenOutputs
from searchrl.reference import Reference
from searchrl.weight_sync import WeightSync

KV_GIB = 2.0


def widened(out: Path, tiny: Path) -> tuple[Path, int]:
    """A bf16 model of about 0.4 billion parameters with TINY's tokenizer; the number of its parameters."""
    folder = out / "wide"
    shutil.copytree(tiny, folder)
    config = AutoConfig.from_pretrained(tiny)
    config.update(
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 6,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
        }
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder, sum(parameter.numel() for parameter in model.parameters())


def used_gib() -> float:
    """Of the whole device, as it says itself."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def loss_sum(outputs: TokenOutputs) -> Tensor:
    """Cross entropy."""
    return -outputs.logprobs.sum()


def turns(folder: Path, stage: int, engine: Engine, phases: Phases, world: World) -> dict[str, object]:
    """Two steps; the engine sleeps at first and at last."""
    model = ModelConfig(path=str(folder))
    actor = Actor(
        folder,
        model=model,
        optimizer=OptimizerConfig(lr=1e-4),
        zero_stage=stage,
        temperature=1.0,
        logprob_chunk=1024,
        total_steps=10,
        seed=0,
        world=world,
        offloads=True,
        events=phases.event,
    )
    reference = Reference(
        folder, model=model, temperature=1.0, logprob_chunk=1024, world=world, offloads=True
    )
    sync = WeightSync(
        actor=actor,
        engine=engine,
        config=SyncConfig(checksum=True),
        temperature=1.0,
        prompts=probe_prompts([40, 70, 100]),
        events=phases.event,
    )
    memory: dict[str, list[float]] = {}
    probes = []

    def note(name: str) -> None:
        memory.setdefault(name, []).append(used_gib())

    runner = asyncio.Runner()
    for step in range(2):
        note("trainer")
        actor.offload()
        note("nobody")
        with phases("sync"):
            probes.append(sync(runner, version=step).probe_max_abs_diff)
        note("engine")
        engine.sleep()
        note("nobody again")
        actor.reload()
        samples = random_samples(step, 8)
        batches = pack(samples, 256)
        reference.logprobs(batches)
        with phases("update"):
            actor.update(batches, loss_sum, denominator=count_loss_tokens(samples), step=step)
    return {"memory": memory, "probes": probes, "phases": phases.metrics()}


def main(out: Path, tiny: Path) -> None:
    """Both ways of keeping an optimizer's states."""
    world = init_world("cuda")
    init_communication(world)
    folder, elements = widened(out, tiny)
    phases = Phases(None, device=world.device)
    taken = torch.empty(int(0.2 * torch.cuda.mem_get_info()[1]), dtype=torch.uint8, device="cuda")
    engine = Engine(  # starts beside whoever holds a part of the GPU
        folder,
        EngineConfig(max_num_seqs=8, kv_cache_gib=KV_GIB),
        dtype=ModelConfig().dtype,
        max_context_tokens=512,
        seed=0,
        world=world,
        events=phases.event,
    )
    del taken
    awake = used_gib()
    engine.sleep()
    results: dict[str, object] = {"elements": elements, "kv_gib": KV_GIB, "slept": awake - used_gib()}
    for stage in (2, 3):
        results[f"zero{stage}"] = turns(folder, stage, engine, phases, world)
    write_results(out, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
