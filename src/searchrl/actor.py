"""The trained policy under DeepSpeed ZeRO, and the initial one. The only module that touches DeepSpeed.

One optimizer step is: any number of ``backward`` passes over micro-batches, each loss a *sum* divided by the
denominator of the whole global step, then ``step``. So gradients do not depend on how the work was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn

from searchrl.algorithm.logprobs import HeadPositions, head_positions
from searchrl.batching import MicroBatch, empty_microbatch
from searchrl.config import Attention, DType, ModelConfig, OptimizerConfig, Schedule
from searchrl.distributed import World, reduce_values, seed_everything
from searchrl.out_of_memory import accumulate, run_passes
from searchrl.policy import (
    PolicyModel,
    Weight,
    adapter_parameters,
    adapters_off,
    add_adapters,
    checkpoint_weights,
    load_model,
    save_adapters,
)

SYNC_BUCKET_ELEMENTS = 64 * 2**20
"""Parameters gathered at one time when weights leave the actor under ZeRO-3."""


@dataclass(kw_only=True, slots=True)
class TokenOutputs:
    """The model's view of a micro-batch's N loss tokens."""

    logprobs: Tensor
    """fp32 [N] with gradient."""
    entropy: Tensor
    """fp32 [N] in nats; ``chunked_logprobs`` says whether with gradient."""
    positions: HeadPositions
    """Where they stand in the flattened micro-batch."""
    batch: MicroBatch


LossSum = Callable[[TokenOutputs], Tensor]
"""Maps token outputs to a scalar: the *sum* of the loss over the micro-batch's tokens."""


@dataclass(kw_only=True, slots=True, frozen=True)
class StepStats:
    """What an optimizer step did."""

    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate that was applied."""


def init_communication(world: World) -> None:
    """Start torch.distributed: gloo on the CPU, NCCL on GPUs. Must precede the engine."""
    if world.device == "cpu":
        # Otherwise a shared-memory helper is compiled for a minute on a fresh machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(world.local_rank)
    deepspeed.init_distributed(dist_backend="gloo" if world.device == "cpu" else "nccl", verbose=False)


class ReferencePolicy(Protocol):
    """What KL penalties compare the trained policy with: the initial one."""

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probabilities of each micro-batch's loss tokens, fp32 [N] each. A collective."""


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
        """
        seed_everything(seed)
        self._optimizer_config = optimizer
        self._total_steps = total_steps
        self._world = world
        self._zero_stage = zero_stage
        self._lora = model.lora
        self._use_tree = _runs_on_trees(model)
        config = _deepspeed_config(model.dtype, zero_stage, optimizer.max_grad_norm, world)
        network = load_model(path, model, zero3=config if zero_stage == 3 else None)
        if model.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        if model.lora.rank:
            add_adapters(network, model.lora, seed=seed)
        self._policy = PolicyModel(network, temperature=temperature, chunk_size=logprob_chunk)
        if zero_stage == 3:  # the head's weight is used outside the head's own forward
            deepspeed.zero.register_external_parameter(self._policy, self._policy.head.weight)
        # One group on purpose: with several, ZeRO-1/2 links only the first to its parameters' state, and
        # whatever reads state by parameter (universal checkpoints, first_moments) fails.
        adamw = torch.optim.AdamW(
            [parameter for parameter in self._policy.parameters() if parameter.requires_grad],
            lr=optimizer.lr,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self._clip: _Clip | None = None
        if zero_stage == 0 and model.dtype is DType.float32:
            self._clip = _Clip(optimizer.max_grad_norm)
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
        return _token_outputs(self._engine, batch.to(self._world.device), self._use_tree)

    def update(
        self, batches: Sequence[MicroBatch], loss_sum: LossSum, *, denominator: float, step: int
    ) -> StepStats:
        """One optimizer step over this rank's micro-batches.

        Ranks may hold different numbers of micro-batches, even none: those with fewer run empty ones so that
        collectives match.

        Args:
            batches: this rank's.
            loss_sum: maps token outputs to the sum of their loss.
            denominator: what the global sum is divided by, the same on all ranks.
            step: optimizer steps already done, for the learning rate.

        Raises:
            OutOfMemoryError: memory ran out; no step was made.
        """
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
        lr = learning_rate(self._optimizer_config, step, self._total_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if self._clip is None else self._clip.norm
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
        for bucket in _buckets(weights, SYNC_BUCKET_ELEMENTS):
            parameters = [parameter for weight in bucket for parameter in weight.parameters]
            with deepspeed.zero.GatheredParameters(parameters):
                yield from ((weight.name, weight.merged()) for weight in bucket)

    def first_moments(self) -> dict[str, Tensor]:
        """AdamW's whole first moments in fp32, by name of the trained parameter. A collective.

        After the first step they are (1 - β1) × the clipped gradient: how tests and diagnosis read gradients
        alike at every ZeRO stage.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        trained = [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]
        if self._clip is not None:
            state = self._engine.optimizer.state
            return {name: state[p]["exp_avg"].clone() for name, p in trained}
        return {name: safe_get_full_optimizer_state(p, "exp_avg").clone() for name, p in trained}

    def save(self, folder: Path, state: dict[str, object]) -> None:
        """Write what is trained and the optimizer's state, with ``state`` beside them. A collective."""
        self._engine.save_checkpoint(
            str(folder),
            tag="actor",
            client_state=state,
            save_latest=False,
            exclude_frozen_parameters=True,
        )

    def load(self, folder: Path) -> dict[str, object]:
        """Read what ``save`` wrote and return its ``state``. A collective.

        Raises:
            FileNotFoundError: there is no checkpoint in ``folder``.
            RuntimeError: it holds other tensors than are trained here.
        """
        path, state = self._engine.load_checkpoint(str(folder), tag="actor")
        if path is None:
            raise FileNotFoundError(f"no actor checkpoint in {folder}")
        return dict(state)

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


class Reference:
    """The frozen initial policy as a model of its own, whole on every rank."""

    def __init__(
        self,
        path: Path | str,
        *,
        model: ModelConfig,
        temperature: float,
        logprob_chunk: int,
        world: World,
    ) -> None:
        network = load_model(path, model).to(world.device).eval().requires_grad_(False)
        self._policy = PolicyModel(network, temperature=temperature, chunk_size=logprob_chunk)
        self._world = world
        self._use_tree = _runs_on_trees(model)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probabilities of each micro-batch's loss tokens, fp32 [N] each. A collective."""

        def run(batch: MicroBatch) -> Tensor:
            return _token_outputs(self._policy, batch.to(self._world.device), self._use_tree).logprobs

        return run_passes(batches, run, zero_stage=0)


@dataclass(slots=True, frozen=True)
class _AdaptersOff:
    """See ``Actor.reference``."""

    actor: Actor

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        with adapters_off(self.actor.network):
            return self.actor.logprobs(batches)


class _Clip:
    """Gradient clipping for ZeRO stage 0 in fp32, where DeepSpeed clips but keeps no norm."""

    def __init__(self, max_norm: float) -> None:
        self._max_norm = max_norm
        self.norm = 0.0

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Runs before the optimizer's step, when gradients have been reduced over the ranks."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norm = float(nn.utils.clip_grad_norm_(parameters, self._max_norm))


def _runs_on_trees(model: ModelConfig) -> bool:
    """FlashAttention takes no mask: it runs the packed row itself, whose position_ids delimit sequences."""
    return model.attention is Attention.sdpa


def _token_outputs(module: Any, batch: MicroBatch, use_tree: bool = True) -> TokenOutputs:
    positions = head_positions(batch.loss_mask, batch.segment_ids)
    targets = batch.input_ids.flatten()[positions.token]
    if batch.tree is None or not use_tree:
        logprobs, entropy = module(batch.input_ids, batch.position_ids, None, positions.predictor, targets)
    else:  # the model runs on the distinct prefixes only
        tree = batch.tree
        logprobs, entropy = module(
            tree.input_ids, tree.position_ids, tree.attention_mask, tree.node_of[positions.predictor], targets
        )
    return TokenOutputs(logprobs=logprobs, entropy=entropy, positions=positions, batch=batch)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 0: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    match config.schedule:
        case Schedule.constant:
            return config.lr
        case Schedule.linear:
            return config.lr * (total_steps - step) / (total_steps - config.warmup_steps)


def _deepspeed_config(dtype: DType, zero_stage: int, max_grad_norm: float, world: World) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world.size,
        # As many backward passes as there are micro-batches, then one step: see Actor.update.
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype is DType.bfloat16},
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 2**31,
    }


def _buckets(weights: Sequence[Weight], max_elements: int) -> Iterator[list[Weight]]:
    """Consecutive weights of together at most ``max_elements`` parameters, at least one weight a bucket."""
    bucket: list[Weight] = []
    size = 0
    for weight in weights:
        elements = sum(parameter.ds_numel for parameter in weight.parameters)
        if bucket and size + elements > max_elements:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += elements
    if bucket:
        yield bucket
