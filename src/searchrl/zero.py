"""DeepSpeed's ZeRO: its configuration, and where it keeps what updates work with and checkpoints hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from searchrl.algorithm.importance import NonFiniteError
from searchrl.config import DType
from searchrl.distributed import World
from searchrl.offload import Offloaded, storages
from searchrl.shards import Piece


def deepspeed_config(dtype: DType, zero_stage: int, max_grad_norm: float, world: World) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is told."""
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


class NonFiniteGradientError(NonFiniteError):
    """The gradient of an optimizer step, summed over all ranks, is NaN or infinite. No step was made."""


def check_norm(norm: float) -> None:
    """Raise ``NonFiniteGradientError`` unless the gradient's norm is finite: alike on all ranks."""
    if not math.isfinite(norm):
        raise NonFiniteGradientError(f"the gradient's norm is {norm:g}")


class NormClip:
    """Gradient clipping for ZeRO stage 0 in fp32, where DeepSpeed clips but keeps no norm."""

    def __init__(self, max_norm: float) -> None:
        self._max_norm = max_norm
        self.norm = 0.0

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Runs before the optimizer's step, when gradients have been reduced over the ranks."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norm = float(nn.utils.clip_grad_norm_(parameters, self._max_norm))
        check_norm(self.norm)


def offload_update(engine: Any, zero_stage: int) -> Offloaded:
    """Move what only an update needs to the host: moments, fp32 master weights, gradients, buckets.

    DeepSpeed's own ``offload_states`` serves its FusedAdam alone at stage 3, and nothing at stage 0.

    Args:
        engine: DeepSpeed's, between two updates.
        zero_stage: 0 to 3.
    """
    kept = {storage.data_ptr() for storage in storages(_parameters(engine.module, zero_stage))}
    states = [t for t in _states(engine.optimizer, zero_stage) if t.untyped_storage().data_ptr() not in kept]
    return Offloaded(states, scratch=_buckets(engine.optimizer, zero_stage))


def _parameters(module: nn.Module, zero_stage: int) -> Iterator[Tensor]:
    """This rank's, whole or in part. In fp32 stage 3 has no master weights beside them."""
    parameter: Any  # DeepSpeed adds attributes
    for parameter in module.parameters():
        yield parameter.data
        if zero_stage == 3:
            yield parameter.ds_tensor


def _adamw(optimizer: Any, zero_stage: int) -> torch.optim.Optimizer:
    """Torch's optimizer inside ZeRO's."""
    adamw: torch.optim.Optimizer = optimizer if zero_stage == 0 else optimizer.optimizer
    return adamw


def _states(optimizer: Any, zero_stage: int) -> Iterator[Tensor]:
    for state in _adamw(optimizer, zero_stage).state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))
    if zero_stage in (1, 2):
        yield from optimizer.single_partition_of_fp32_groups
    elif zero_stage == 3:
        yield from optimizer.fp32_partitioned_groups_flat
        yield optimizer.grad_partitions_flat_buffer


def _buckets(optimizer: Any, zero_stage: int) -> Iterator[Tensor]:
    """Where gradients are collected before they are reduced: half a billion numbers, dead after a step."""
    if zero_stage > 0:
        for bucket in optimizer.ipg_buckets.values():
            yield from [bucket.buffer] if zero_stage == 3 else bucket.buffer


@dataclass(kw_only=True, slots=True, frozen=True)
class _Place:
    """Where this rank keeps its share of a parameter."""

    flat: Tensor
    """What AdamW sees: the parameter itself, or ZeRO's buffer of the shares of many."""
    offset: int
    """Of the share in it."""
    start: int
    """The share's first element in the parameter."""
    length: int
    size: int
    """Of the whole parameter."""


def optimizer_steps(engine: Any, zero_stage: int) -> int:
    """AdamW's count of its steps; 0 before it has states."""
    states = [state for state in _adamw(engine.optimizer, zero_stage).state.values() if state]
    return int(states[0]["step"]) if states else 0


def make_states(engine: Any, zero_stage: int, *, steps: int) -> None:
    """Give a new AdamW the states that it would make in its first step, as after ``steps`` of them."""
    adamw = _adamw(engine.optimizer, zero_stage)
    for place in _places(engine, zero_stage, rank=0).values():  # every rank has the same buffers
        adamw.state[place.flat] = {
            "step": torch.tensor(float(steps), device=place.flat.device),  # where fused kernels want it
            "exp_avg": torch.zeros_like(place.flat),
            "exp_avg_sq": torch.zeros_like(place.flat),
        }


def trained_pieces(engine: Any, zero_stage: int, world: World) -> list[Piece]:
    """The trained parameters as far as this rank holds them, with their moments if AdamW has made a step.

    Padding, which ZeRO adds to make shares equal, is no part of them. At stage 0 every rank holds all.
    """
    adamw = _adamw(engine.optimizer, zero_stage)
    pieces = []
    for name, place in _places(engine, zero_stage, world.rank).items():
        state = adamw.state.get(place.flat, {})
        kept = {"weight": place.flat, **{k: v for k, v in state.items() if k in ("exp_avg", "exp_avg_sq")}}
        tensors = {
            kind: tensor.detach().view(-1).narrow(0, place.offset, place.length)
            for kind, tensor in kept.items()
        }
        pieces.append(Piece(name=name, start=place.start, size=place.size, tensors=tensors))
    return pieces


def refresh_parameters(engine: Any, zero_stage: int) -> None:
    """Bring the parameters that the model computes with up to the master weights. A collective.

    As DeepSpeed 0.19 does at the end of a step, or after loading a checkpoint of its own.
    """
    optimizer = engine.optimizer
    if zero_stage in (1, 2):
        optimizer.update_lp_params()
        if _adamw(optimizer, zero_stage).state:
            optimizer._lazy_init_hp_params_optimizer_state()  # else states cannot be found by parameter
    elif zero_stage == 3:
        for group in range(len(optimizer.fp16_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters are whole on every rank, and hold what they held before.
        if whole := optimizer.persistent_parameters:
            whole[0].partition(whole)
            whole[0].all_gather(whole)


def _places(engine: Any, zero_stage: int, rank: int) -> dict[str, _Place]:
    """By name of the trained parameter; parameters of which the rank holds nothing are left out."""
    optimizer, places = engine.optimizer, {}
    parameter: Any  # DeepSpeed adds attributes
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if zero_stage == 0:
            flat, offset, start, length = parameter, 0, 0, parameter.numel()
            size = length
        elif zero_stage == 3:
            group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat, size = optimizer.fp32_partitioned_groups_flat[group], parameter.ds_numel
            start = rank * share
            length = min(share, size - start)
        else:
            mapping, size = parameter._hp_mapping, parameter.numel()
            if mapping is None:
                continue
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            offset, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
            length = mapping.lp_fragment_address.numel
        if length > 0:
            places[name] = _Place(flat=flat, offset=offset, start=start, length=length, size=size)
    return places
