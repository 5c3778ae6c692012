"""The trained policy under DeepSpeed ZeRO, and the frozen reference. The only module that touches DeepSpeed.

One optimizer step is: any number of ``backward`` passes over micro-batches, each loss a *sum* divided by the
denominator of the whole global step, then ``step``. So gradients do not depend on how the work was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from searchrl.algorithm.logprobs import HeadPositions, chunked_logprobs, head_positions
from searchrl.batching import MicroBatch, empty_microbatch
from searchrl.config import DType, ModelConfig, OptimizerConfig, Schedule
from searchrl.distributed import World, reduce_values, seed_everything

SYNC_BUCKET_ELEMENTS = 64 * 2**20
"""Parameters gathered at one time when weights leave the actor under ZeRO-3."""


@dataclass(kw_only=True, slots=True)
class TokenOutputs:
    """The model's view of a micro-batch's N loss tokens."""

    logprobs: Tensor
    """fp32 [N] with gradient."""
    entropy: Tensor
    """fp32 [N] in nats, without gradient."""
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


class PolicyModel(nn.Module):
    """A causal language model that returns log-probabilities of loss tokens instead of logits."""

    def __init__(self, model: nn.Module, *, temperature: float, chunk_size: int) -> None:
        super().__init__()
        self.model: Any = model
        self.temperature = temperature
        self.chunk_size = chunk_size

    @property
    def head(self) -> Any:
        """The language-model head."""
        return self.model.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        predictor: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of ``targets``.

        Args:
            input_ids: [B, T].
            position_ids: [B, T], restarting at every packed trajectory.
            attention_mask: bool [B, 1, T, T], or None: causal within what ``position_ids`` delimits.
            predictor: [N] flat positions whose hidden state predicts a target.
            targets: [N] token ids.

        Returns:
            fp32 [N], fp32 [N].
        """
        # Without a cache transformers derives the block-diagonal mask of packed rows from position_ids.
        hidden = self.model.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        hidden = hidden.flatten(0, 1)[predictor]
        head = self.head
        return chunked_logprobs(
            hidden, head.weight, getattr(head, "bias", None), targets, self.temperature, self.chunk_size
        )


def init_communication(world: World) -> None:
    """Start torch.distributed: gloo on the CPU, NCCL on GPUs. Must precede the engine."""
    if world.device == "cpu":
        # Otherwise a shared-memory helper is compiled for a minute on a fresh machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(world.local_rank)
    deepspeed.init_distributed(dist_backend="gloo" if world.device == "cpu" else "nccl", verbose=False)


def _load_model(path: Path | str, dtype: DType) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="sdpa")


def _load_partitioned(path: Path | str, dtype: DType, config: dict[str, Any]) -> Any:
    """Load for ZeRO-3: parameters are split as they are read, and never whole on one rank."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(config)  # transformers looks for it through a weak reference
    network = _load_model(path, dtype)
    del keep_alive
    return network


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
            model: number format and checkpointing of activations.
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
        config = _deepspeed_config(model.dtype, zero_stage, optimizer.max_grad_norm, world)
        network = (
            _load_partitioned(path, model.dtype, config)
            if zero_stage == 3
            else _load_model(path, model.dtype)
        )
        if model.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        self._policy = PolicyModel(network, temperature=temperature, chunk_size=logprob_chunk)
        if zero_stage == 3:  # the head's weight is used outside the head's own forward
            deepspeed.zero.register_external_parameter(self._policy, self._policy.head.weight)
        # One group on purpose: with several, ZeRO-1/2 links only the first to its parameters' state, and
        # whatever reads state by parameter (universal checkpoints, first_moments) fails.
        adamw = torch.optim.AdamW(
            self._policy.parameters(),
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
        return _token_outputs(self._engine, batch.to(self._world.device))

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
        """
        most = int(reduce_values([float(len(batches))], "max")[0])
        padding = [empty_microbatch() for _ in range(most - len(batches))]
        for batch in [*batches, *padding]:
            # DeepSpeed averages gradients over ranks; ours are shares of one global sum.
            loss = loss_sum(self.forward(batch)) * (self._world.size / denominator)
            self._engine.backward(loss, scale_wrt_gas=False)
        lr = learning_rate(self._optimizer_config, step, self._total_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if self._clip is None else self._clip.norm
        return StepStats(grad_norm=float(norm), lr=lr)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probabilities of each micro-batch's loss tokens, [N] each. A collective under ZeRO-3."""
        most = int(reduce_values([float(len(batches))], "max")[0])
        outputs = [self.forward(batch).logprobs for batch in batches]
        for _ in range(most - len(batches)):
            self.forward(empty_microbatch())
        if self._zero_stage == 3:  # a forward without backward leaves parameters gathered
            self._engine.empty_partition_cache()
        return outputs

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters in checkpoint form, in module order; a tied head appears once. A collective.

        Under ZeRO-3 a tensor is valid only until the next is asked for.
        """
        named = list(self.network.named_parameters())
        if self._zero_stage < 3:
            yield from ((name, parameter.data) for name, parameter in named)
            return
        for bucket in _buckets(named, SYNC_BUCKET_ELEMENTS):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
                yield from ((name, parameter.data) for name, parameter in bucket)

    def first_moments(self) -> dict[str, Tensor]:
        """AdamW's whole first moments in fp32, by parameter name. A collective.

        After the first step they are (1 - β1) × the clipped gradient: how tests and diagnosis read gradients
        alike at every ZeRO stage.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._clip is not None:
            state = self._engine.optimizer.state
            return {name: state[p]["exp_avg"].clone() for name, p in self.network.named_parameters()}
        return {
            name: safe_get_full_optimizer_state(parameter, "exp_avg").clone()
            for name, parameter in self.network.named_parameters()
        }

    def save(self, folder: Path, state: dict[str, object]) -> None:
        """Write weights and optimizer state, with ``state`` beside them. A collective."""
        self._engine.save_checkpoint(str(folder), tag="actor", client_state=state, save_latest=False)

    def load(self, folder: Path) -> dict[str, object]:
        """Read what ``save`` wrote and return its ``state``. A collective.

        Raises:
            FileNotFoundError: there is no checkpoint in ``folder``.
        """
        path, state = self._engine.load_checkpoint(str(folder), tag="actor")
        if path is None:
            raise FileNotFoundError(f"no actor checkpoint in {folder}")
        return dict(state)

    def export(self, folder: Path, tokenizer: Any) -> None:
        """Write a Hugging Face model folder that transformers and vLLM load. A collective."""
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


class Reference:
    """The frozen initial policy, loaded only when a KL term needs it."""

    def __init__(
        self,
        path: Path | str,
        *,
        model: ModelConfig,
        temperature: float,
        logprob_chunk: int,
        world: World,
    ) -> None:
        network = _load_model(path, model.dtype).to(world.device).eval().requires_grad_(False)
        self._policy = PolicyModel(network, temperature=temperature, chunk_size=logprob_chunk)
        self._world = world

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probabilities of the micro-batch's loss tokens, fp32 [N]."""
        return _token_outputs(self._policy, batch.to(self._world.device)).logprobs


class _Clip:
    """Gradient clipping for ZeRO stage 0 in fp32, where DeepSpeed clips but keeps no norm."""

    def __init__(self, max_norm: float) -> None:
        self._max_norm = max_norm
        self.norm = 0.0

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Runs before the optimizer's step, when gradients have been reduced over the ranks."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norm = float(nn.utils.clip_grad_norm_(parameters, self._max_norm))


def _token_outputs(module: Any, batch: MicroBatch) -> TokenOutputs:
    positions = head_positions(batch.loss_mask, batch.segment_ids)
    targets = batch.input_ids.flatten()[positions.token]
    if batch.tree is None:
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


def _buckets(named: Sequence[tuple[str, Any]], max_elements: int) -> Iterator[list[tuple[str, Any]]]:
    """Consecutive parameters of together at most ``max_elements``, at least one a bucket."""
    bucket: list[tuple[str, Any]] = []
    size = 0
    for name, parameter in named:
        if bucket and size + parameter.ds_numel > max_elements:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += parameter.ds_numel
    if bucket:
        yield bucket
