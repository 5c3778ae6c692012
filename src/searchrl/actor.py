"""The trained policy under DeepSpeed ZeRO. The only module that touches DeepSpeed.

One optimizer step is: any number of ``backward`` passes over micro-batches, each loss a *sum* divided by the
denominator of the whole global step, then ``step``. So gradients do not depend on how the work was cut.

Between updates the parameters alone are needed: to score tokens and to sync the engine. What else an update
works with can leave the device meanwhile (``offload``, ``reload``).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from searchrl.batching import MicroBatch, empty_microbatch
from searchrl.config import DType, ModelConfig, OptimizerConfig, Schedule
from searchrl.distributed import World, gather_objects, reduce_values, seed_everything
from searchrl.errors import SearchrlError
from searchrl.offload import Offloaded
from searchrl.out_of_memory import accumulate, run_passes
from searchrl.phases import Events, no_events
from searchrl.policy import (
    PolicyModel,
    ReferencePolicy,
    TokenOutputs,
    adapter_parameters,
    adapters_off,
    add_adapters,
    checkpoint_weights,
    load_model,
    runs_on_trees,
    save_adapters,
    token_outputs,
    weight_buckets,
)
from searchrl.shards import ShardError, read_pieces, saved_steps, write_pieces
from searchrl.zero import (
    NormClip,
    check_norm,
    deepspeed_config,
    make_states,
    offload_update,
    optimizer_steps,
    refresh_parameters,
    trained_pieces,
)

SYNC_BUCKET_ELEMENTS = 64 * 2**20
"""Parameters gathered at one time when weights leave the actor under ZeRO-3."""

LossSum = Callable[[TokenOutputs], Tensor]
"""Maps token outputs to a scalar: the *sum* of the loss over the micro-batch's tokens."""


@dataclass(kw_only=True, slots=True, frozen=True)
class StepStats:
    """What an optimizer step did."""

    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate that was applied."""


class OffloadedError(SearchrlError, RuntimeError):
    """The optimizer was asked for while its states are on the host."""


def init_communication(world: World) -> None:
    """Start torch.distributed: gloo on the CPU, NCCL on GPUs. Must precede the engine."""
    if world.device == "cpu":
        # Otherwise a shared-memory helper is compiled for a minute on a fresh machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(world.local_rank)
    backend = "gloo" if world.device == "cpu" else "nccl"
    deepspeed.init_distributed(backend, verbose=False, timeout=timedelta(seconds=world.timeout_s))


def forget_groups() -> None:
    """Let go of DeepSpeed's process groups, which were destroyed: it would hand them to the next run."""
    deepspeed.utils.groups._release_process_group_references()


class Actor:
    """The policy that is trained."""

    def __init__(
        self,
        path: Path | str,
        *,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        zero_stage: int,
        temperature: float,
        logprob_chunk: int,
        total_steps: int,
        seed: int,
        world: World,
        offloads: bool = False,
        events: Events = no_events,
    ) -> None:
        """Load the model and shard it over the ranks. ``init_communication`` must have run.

        Args:
            path: local folder or hub name.
            model: number format, checkpointing of activations, attention kernels, adapters.
            optimizer: AdamW, which decays all parameters alike, and its schedule.
            zero_stage: 0 to 3.
            temperature: the sampling temperature, which the log-probabilities share.
            logprob_chunk: loss positions whose logits exist at one time.
            total_steps: optimizer steps of the run, for the schedule.
            seed: global seed.
            world: this rank.
            offloads: ``offload`` moves something; False: there is memory to spare, or no device of its own.
            events: hears of what moves.
        """
        seed_everything(seed)
        self._optimizer_config = optimizer
        self._total_steps = total_steps
        self._world = world
        self._zero_stage = zero_stage
        self._lora = model.lora
        self._offloads = offloads
        self._offloaded: Offloaded | None = None
        self._events = events
        self._use_tree = runs_on_trees(model)
        config = deepspeed_config(model.dtype, zero_stage, optimizer.max_grad_norm, world)
        network = load_model(path, model, zero3=config if zero_stage == 3 else None)
        if model.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        if model.lora.rank:
            add_adapters(network, model.lora, seed=seed)
        self._policy = PolicyModel(network, temperature=temperature, chunk_size=logprob_chunk)
        if zero_stage == 3:  # the head's weight is used outside the head's own forward
            deepspeed.zero.register_external_parameter(self._policy, self._policy.head.weight)
        adamw = _adamw(self._policy, optimizer)
        self._clip: NormClip | None = None
        if zero_stage == 0 and model.dtype is DType.float32:
            self._clip = NormClip(optimizer.max_grad_norm)
            adamw.register_step_pre_hook(self._clip)
            config["gradient_clipping"] = 0.0
        self._engine, *_ = deepspeed.initialize(
            model=self._policy, optimizer=adamw, config=config, dist_init_required=False
        )
        self._engine.train()

    @property
    def network(self) -> Any:
        """The Hugging Face model. Its parameters are partitioned under ZeRO-3."""
        return self._policy.model

    def forward(self, batch: MicroBatch) -> TokenOutputs:
        """Log-probabilities of the micro-batch's loss tokens, with gradient."""
        return token_outputs(self._engine, batch.to(self._world.device), self._use_tree)

    def update(
        self,
        batches: Sequence[MicroBatch],
        loss_sum: LossSum,
        *,
        denominator: float,
        step: int,
        before_step: Callable[[], None] = lambda: None,
    ) -> StepStats:
        """One optimizer step over this rank's micro-batches.

        Ranks may hold different numbers of micro-batches, even none: those with fewer run empty ones so that
        collectives match.

        Args:
            batches: this rank's.
            loss_sum: maps token outputs to the sum of their loss.
            denominator: what the global sum is divided by, the same on all ranks.
            step: optimizer steps already done, for the learning rate.
            before_step: called between the passes and the optimizer's step, a place where all ranks may stop.

        Raises:
            NonFiniteGradientError: the gradient is NaN or infinite, on all ranks; no step was made.
            OffloadedError: between ``offload`` and ``reload``.
            OutOfMemoryError: memory ran out; no step was made.
        """
        self._need_states()
        most = int(reduce_values([float(len(batches))], "max")[0])
        padding = [empty_microbatch() for _ in range(most - len(batches))]
        # DeepSpeed averages gradients over ranks; ours are shares of one global sum.
        scale = self._world.size / denominator
        accumulate(
            self._engine,
            [*batches, *padding],
            lambda batch: loss_sum(self.forward(batch)) * scale,
            zero_stage=self._zero_stage,
            world=self._world,
        )
        before_step()
        lr = learning_rate(self._optimizer_config, step, self._total_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if self._clip is None else self._clip.norm
        check_norm(float(norm))  # DeepSpeed leaves the step out without a word and calls the norm infinite
        return StepStats(grad_norm=float(norm), lr=lr)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probabilities of each micro-batch's loss tokens, [N] each. A collective.

        Raises:
            OutOfMemoryError: memory ran out.
        """
        most = int(reduce_values([float(len(batches))], "max")[0])
        outputs = run_passes(batches, lambda batch: self.forward(batch).logprobs, zero_stage=self._zero_stage)
        for _ in range(most - len(batches)):
            self.forward(empty_microbatch())
        if self._zero_stage == 3:  # a forward without backward leaves parameters gathered
            self._engine.empty_partition_cache()
        return outputs

    def reference(self) -> ReferencePolicy:
        """The initial policy: this network without its adapters, at no memory of its own.

        Raises:
            ValueError: there are no adapters, so the initial policy is gone with the first step.
        """
        if not self._lora.rank:
            raise ValueError("without adapters (model.lora) the actor is no reference; load a Reference")
        return _AdaptersOff(self)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole weights in checkpoint form, adapters merged, in module order; a tied head appears once.

        A collective. Under ZeRO-3 a tensor is valid only until the next is asked for.
        """
        weights = checkpoint_weights(self.network, self._lora)
        if self._zero_stage < 3:
            yield from ((weight.name, weight.merged()) for weight in weights)
            return
        for bucket in weight_buckets(weights, SYNC_BUCKET_ELEMENTS):
            parameters = [parameter for weight in bucket for parameter in weight.parameters]
            with deepspeed.zero.GatheredParameters(parameters):
                yield from ((weight.name, weight.merged()) for weight in bucket)

    def offload(self) -> None:
        """Move what only an update needs to the host: moments, fp32 master weights, gradients' buffers.

        The parameters stay. Syncing reads them, and the probe after it needs them beside the engine's whole
        key-value cache: moving them away after that would lower the rollout's peak, but not the run's.
        """
        if not self._offloads or self._offloaded is not None:
            self._events("actor_offload", noop=True)
            return
        self._offloaded = offload_update(self._engine, self._zero_stage)
        host, freed = self._offloaded.host_bytes, self._offloaded.freed_bytes
        self._events("actor_offload", noop=False, host_bytes=host, freed_bytes=freed)

    def reload(self) -> None:
        """Bring back what ``offload`` took, bit by bit."""
        offloaded, self._offloaded = self._offloaded, None
        if offloaded is not None:
            offloaded.reload()
        self._events("actor_reload", noop=offloaded is None)

    def _need_states(self) -> None:
        if self._offloaded is not None:
            raise OffloadedError("the optimizer's states are on the host: call Actor.reload() first")

    def first_moments(self) -> dict[str, Tensor]:
        """AdamW's whole first moments in fp32, by name of the trained parameter. A collective.

        After the first step they are (1 - β1) × the clipped gradient: how tests and diagnosis read gradients
        alike at every ZeRO stage.
        """
        self._need_states()
        from deepspeed.utils import safe_get_full_optimizer_state

        trained = [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]
        if self._clip is not None:
            state = self._engine.optimizer.state
            return {name: state[p]["exp_avg"].clone() for name, p in trained}
        return {name: safe_get_full_optimizer_state(p, "exp_avg").clone() for name, p in trained}

    def save(self, folder: Path) -> None:
        """Write this rank's share of what is trained and of AdamW's moments into ``folder``. No collective.

        Raises:
            OffloadedError: between ``offload`` and ``reload``.
            ShardError: the files cannot be written.
        """
        self._need_states()
        # Without ZeRO every rank has everything.
        pieces = (
            trained_pieces(self._engine, self._zero_stage, self._world)
            if self._zero_stage > 0 or self._world.is_main
            else []
        )
        steps = optimizer_steps(self._engine, self._zero_stage)
        write_pieces(pieces, folder, rank=self._world.rank, steps=steps)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote on any number of ranks, at any ZeRO stage; before any step. A collective.

        Raises:
            OffloadedError: between ``offload`` and ``reload``.
            ShardError: ``folder`` does not hold everything that is trained here.
        """
        self._need_states()
        steps = saved_steps(folder)
        if steps:
            make_states(self._engine, self._zero_stage, steps=steps)
        refusal = ""
        try:
            read_pieces(trained_pieces(self._engine, self._zero_stage, self._world), folder)
        except ShardError as failure:
            refusal = str(failure)
        # Ranks read different parts: who went on alone would wait for the others for ever.
        for refused in filter(None, gather_objects(refusal)):
            raise ShardError(refused)
        refresh_parameters(self._engine, self._zero_stage)

    def export(self, folder: Path, tokenizer: Any) -> None:
        """Write a Hugging Face model folder that transformers and vLLM load. A collective.

        Adapters are merged into it, and written to ``adapter`` inside it in peft's own format as well.
        """
        from safetensors.torch import save_file

        weights = {}
        for name, tensor in self.named_weights():
            if self._world.is_main:
                weights[name] = tensor.detach().to("cpu", copy=True).contiguous()
        if self._world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            self.network.config.save_pretrained(folder)
            if self.network.generation_config is not None:
                self.network.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        adapters = dict(adapter_parameters(self.network))
        with deepspeed.zero.GatheredParameters(list(adapters.values()), enabled=self._zero_stage == 3):
            if self._world.is_main and adapters:
                save_adapters(
                    self.network, folder / "adapter", {name: p.detach().cpu() for name, p in adapters.items()}
                )

    def close(self) -> None:
        """Give its memory back, which DeepSpeed's hooks keep otherwise. The last thing to be called.

        Under ZeRO-3 DeepSpeed 0.19 keeps it all the same: in classes that it makes for each module.
        """
        self._engine.destroy()
        del self._engine, self._policy, self._clip
        gc.collect()  # network, optimizer and engine refer to one another
        torch.cuda.empty_cache()


@dataclass(slots=True, frozen=True)
class _AdaptersOff:
    """See ``Actor.reference``."""

    actor: Actor

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        with adapters_off(self.actor.network):
            return self.actor.logprobs(batches)


def _adamw(policy: PolicyModel, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    # One group on purpose: with several, ZeRO-1/2 links only the first to its parameters' state, and
    # whatever reads state by parameter (universal checkpoints, first_moments) fails.
    return torch.optim.AdamW(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=optimizer.lr,
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 0: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    match config.schedule:
        case Schedule.constant:
            return config.lr
        case Schedule.linear:
            return config.lr * (total_steps - step) / (total_steps - config.warmup_steps)
