"""Adapters under DeepSpeed: ``lora_checks OUT TIED UNTIED``.

Writes, by case, what was measured; the initial adapters go to ``adapters.pt``. Expected values come from a
plain transformers model whose weights are W + alpha/rank · BA, written out here, and from autograd. One rank
syncs an engine as well. Checkpointing of activations is checked on one rank for the whole model, on two for
adapters.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration.scripts.common import probe_prompts, random_samples, write_results
from integration.scripts.shard_checks import save_actor
from searchrl.actor import Actor, init_communication
from searchrl.batching import balance, count_loss_tokens, pack
from searchrl.config import DType, EngineConfig, LoraConfig, ModelConfig, OptimizerConfig, SyncConfig
from searchrl.distributed import World, barrier, gather_objects, init_world
from searchrl.engine import Engine
from searchrl.policy import TokenOutputs, adapter_parameters
from searchrl.shards import ShardError
from searchrl.trajectory import Sample
from searchrl.weight_sync import SyncError, Weights, WeightSync

Tensors = dict[str, Tensor]
LORA = LoraConfig(rank=4, alpha=8.0)
SCALE = 2.0
TEMPERATURE, LR = 0.7, 2e-2
SAMPLES = random_samples(0, 3)
"""Three, each a micro-batch of its own: of two ranks one has more."""


@dataclass(frozen=True)
class Case:
    """One way of training."""

    model: str
    stage: int
    checkpointing: bool = False
    rank: int = LORA.rank
    dtype: DType = DType.float32


CASES = {f"zero{stage}": Case("tied", stage) for stage in (0, 2, 3)}
CHECKPOINTING = {
    f"{model}/{'lora' if rank else 'whole'}": Case(model, 3, checkpointing=True, rank=rank)
    for model in ("tied", "untied")
    for rank in (LORA.rank, 0)
}
BF16 = Case("tied", 2, dtype=DType.bfloat16)


class Bench:
    """The cases' models and this rank."""

    def __init__(self, out: Path, folders: Mapping[str, Path]) -> None:
        self.out, self.folders = out, folders
        self.world: World = init_world("cpu")
        init_communication(self.world)

    def actor(self, case: Case) -> Actor:
        """β1 = 0: the first moment is the last step's gradient."""
        return Actor(
            self.folders[case.model],
            model=ModelConfig(
                dtype=case.dtype,
                gradient_checkpointing=case.checkpointing,
                lora=LoraConfig(rank=case.rank, alpha=LORA.alpha),
            ),
            optimizer=OptimizerConfig(lr=LR, betas=(0.0, 0.98), max_grad_norm=1e9),
            zero_stage=case.stage,
            temperature=TEMPERATURE,
            logprob_chunk=64,
            total_steps=100,
            seed=0,
            world=self.world,
        )

    @property
    def batches(self) -> list[Any]:
        """This rank's micro-batches."""
        return pack(balance(SAMPLES, self.world.size)[self.world.rank], 1)

    def step(self, actor: Actor, step: int) -> Tensors:
        """Make advantageous tokens likelier; returns the gradient."""
        actor.update(self.batches, loss_sum, denominator=count_loss_tokens(SAMPLES), step=step)
        return actor.first_moments()

    def logprobs(self, policy: Any) -> Tensor:
        """Of this rank's tokens."""
        return torch.cat([*policy.logprobs(self.batches), torch.empty(0)])

    def plain(self, case: Case) -> Any:
        """The model as it is on disk."""
        return AutoModelForCausalLM.from_pretrained(self.folders[case.model], dtype=torch.float32)


def loss_sum(outputs: TokenOutputs) -> Tensor:
    """REINFORCE without a ratio."""
    return -(outputs.logprobs * outputs.batch.advantages.flatten()[outputs.positions.token]).sum()


def adapters(actor: Actor) -> Tensors:
    """Whole copies, at every ZeRO stage."""
    named = adapter_parameters(actor.network)
    with deepspeed.zero.GatheredParameters([parameter for _, parameter in named]):
        return {name: parameter.detach().clone() for name, parameter in named}


def merged(weights: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> Tensors:
    """W + alpha/rank · BA by the book, differentiable in the factors."""
    result = dict(weights)
    for name in factors:
        if ".lora_A." in name:
            layer = name.removesuffix(".lora_A.default.weight")
            result[f"{layer}.weight"] = weights[f"{layer}.weight"] + SCALE * (
                factors[f"{layer}.lora_B.default.weight"] @ factors[name]
            )
    return result


def book_logprobs(network: Any, weights: Tensors, sample: Sample) -> Tensor:
    """Of the sample's loss tokens: whole logits, one sequence, no padding or packing."""
    ids = torch.tensor([sample.trajectory.token_ids])
    output = functional_call(network, weights, (), {"input_ids": ids, "use_cache": False})
    logprobs: Tensor = (
        (output.logits[0, :-1] / TEMPERATURE).log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    )
    return logprobs[torch.tensor(sample.trajectory.loss_mask)[1:]]


def book_gradient(network: Any, factors: Tensors) -> Tensors:
    """What autograd says of the adapters."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in factors.items()}
    weights = merged({n: p.detach() for n, p in network.named_parameters()}, leaves)
    total = sum((book_logprobs(network, weights, s) * s.advantage).sum() for s in SAMPLES)
    assert isinstance(total, Tensor)
    (-total / count_loss_tokens(SAMPLES)).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, relative: bool = False) -> float:
    """The largest difference; relative to each tensor's norm, so that no small one hides."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    if relative:
        return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)
    return max(float((found[n] - expected[n]).abs().max()) for n in expected)


def weights_of(actor: Actor) -> Tensors:
    """Copies of what the engine would get."""
    return {name: tensor.clone() for name, tensor in actor.named_weights()}


def check(bench: Bench, name: str, case: Case) -> tuple[dict[str, Any], Tensors]:
    """Two steps, a checkpoint, a third; and the third once more from the checkpoint."""
    actor, network = bench.actor(case), bench.plain(case)
    base = {key: p.detach().clone() for key, p in network.named_parameters()}
    start, initial = adapters(actor), bench.logprobs(actor)
    bench.step(actor, 0)
    factors = adapters(actor)
    gradient = bench.step(actor, 1)
    trained = merged(base, adapters(actor))
    folder = bench.out / name
    save_actor(actor, folder, bench.world)
    actor.export(folder / "model", AutoTokenizer.from_pretrained(bench.folders[case.model]))
    result = {
        "gradient": error(gradient, book_gradient(network, factors), relative=True),
        "logprobs moved": float((bench.logprobs(actor) - initial).abs().max()),
        "reference moved": float((bench.logprobs(actor.reference()) - initial).abs().max()),
        "merge": error(weights_of(actor), trained),
        "merge matters": error(trained, base),
        "base moved": base_moved(actor, base),
        "exported": exported(bench, case, folder / "model", trained),
    }
    after = bench.step(actor, 2), weights_of(actor)
    resumed = bench.actor(case)
    resumed.load(folder)
    again = bench.step(resumed, 2), weights_of(resumed)
    result["resumed"] = max(error(again[i], after[i]) for i in range(2))
    result |= files(bench, folder, case)
    return result, start


def base_moved(actor: Actor, base: Mapping[str, Tensor]) -> float:
    """How far frozen weights are from those on disk."""
    named = {n: p for n, p in actor.network.named_parameters() if not p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(named.values())):
        found = {name.replace(".base_layer.", "."): p.detach().clone() for name, p in named.items()}
    return error(found, base)


def exported(bench: Bench, case: Case, folder: Path, trained: Tensors) -> list[float]:
    """Differences in log-probability: merged model and base with adapter, against the book."""
    barrier()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(bench.plain(case), folder / "adapter").merge_and_unload()
    sample = SAMPLES[0]
    with torch.no_grad():
        expected = book_logprobs(bench.plain(case), trained, sample)
        return [
            float((book_logprobs(model, dict(model.named_parameters()), sample) - expected).abs().max())
            for model in (whole, with_adapter)
        ]


def files(bench: Bench, folder: Path, case: Case) -> dict[str, Any]:
    """What the checkpoint holds, and what loading says when it holds less."""
    stored = {path: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    names = {key.split(":", 2)[2] for tensors in stored.values() for key in tensors}
    barrier()
    if bench.world.is_main:
        for path, tensors in stored.items():
            kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(min(names))}
            save_file(kept, path, metadata={"optimizer_steps": "2"})
    barrier()
    try:
        bench.actor(case).load(folder)
        refusal = ""
    except ShardError as failure:
        refusal = str(failure)
    return {
        "saved": [len(names), all(".lora_" in name for name in names)],
        "refusal": [refusal, min(names)],
    }


def check_checkpointing(bench: Bench, case: Case) -> dict[str, Any]:
    """The second step's gradient with activations recomputed and without, and how often a layer ran."""
    runs: list[int] = []
    gradients: list[Tensors] = []
    for checkpointing in (True, False):
        actor = bench.actor(replace(case, checkpointing=checkpointing))
        bench.step(actor, 0)
        counted: list[None] = []
        # Before it runs: recomputation stops as soon as the backward pass has what it needs.
        layer = actor.network.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, seen=counted: seen.append(None))
        gradients.append(bench.step(actor, 1))
        runs.append(len(counted))
    refusal = ""
    if not case.rank:
        try:
            actor.reference()
        except ValueError as failure:
            refusal = str(failure)
    return {
        "error": error(gradients[0], gradients[1], relative=True),
        "runs": runs,
        "reference": refusal,
    }


def check_bf16(bench: Bench) -> dict[str, Any]:
    """Steps in bf16, with fp32 master weights."""
    actor = bench.actor(BF16)
    initial = bench.logprobs(actor)
    for step in range(3):
        bench.step(actor, step)
    advantages = torch.cat([*(b.advantages[b.loss_mask] for b in bench.batches), torch.empty(0)])
    gain = float(((bench.logprobs(actor) - initial) * advantages).sum())
    return {
        "gain": sum(gather_objects(gain)),
        "reference moved": float((bench.logprobs(actor.reference()) - initial).abs().max()),
        "dtypes": sorted({str(tensor.dtype) for tensor in weights_of(actor).values()}),
    }


def check_engine(bench: Bench) -> dict[str, Any]:
    """Sync trained adapters into an engine, merged and not."""
    actor = bench.actor(CASES["zero2"])
    engine = Engine(
        bench.folders["tied"],
        EngineConfig(max_num_seqs=8, kv_cache_gib=0.0625),
        dtype=DType.float32,
        max_context_tokens=512,
        seed=0,
        world=bench.world,
    )
    sync = WeightSync(
        actor=actor,
        engine=engine,
        config=SyncConfig(probe_max_abs_diff=1e-3),
        temperature=TEMPERATURE,
        prompts=probe_prompts([40, 70, 100]),
    )
    base = dict(bench.plain(CASES["zero2"]).named_parameters())

    def unmerged(weights: Weights) -> Weights:
        return ((name, base[name].detach()) for name, _ in weights)

    runner = asyncio.Runner()
    result: dict[str, Any] = {"start": sync(runner, version=0).probe_max_abs_diff}
    for step in range(3):
        bench.step(actor, step)
    try:
        sync(runner, version=1, tamper=unmerged)
        result["unmerged"] = ""
    except SyncError as refusal:
        result["unmerged"] = str(refusal)
    result["merged"] = sync(runner, version=2).probe_max_abs_diff
    return result


def agree(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' results by key: numbers' maximum, one rank's of what must be alike on all."""
    return {
        key: max(result[key] for result in results) if isinstance(value, float) else value
        for key, value in results[0].items()
    }


def main(out: Path, tied: Path, untied: Path) -> None:
    """Run every case on all ranks."""
    bench = Bench(out, {"tied": tied, "untied": untied})
    results: dict[str, Any] = {}
    if bench.world.size == 1:
        results["engine"] = check_engine(bench)
    for name, case in CHECKPOINTING.items():
        if (case.rank > 0) == (bench.world.size > 1):
            results[name] = agree(gather_objects(check_checkpointing(bench, case)))
    starts: dict[str, Any] = {}
    for name, case in CASES.items():
        mine, starts[name] = check(bench, name, case)
        results[name] = agree(gather_objects(mine))
        others = gather_objects(starts[name])
        assert all(error(other, starts[name]) == 0 for other in others), f"{name}: ranks start apart"
    results["bf16"] = agree(gather_objects(check_bf16(bench)))
    if bench.world.is_main:
        torch.save(starts, out / "adapters.pt")
        write_results(out, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
