"""DeepSpeed's ZeRO: its configuration, and where it keeps what an update works with."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from searchrl.algorithm.importance import NonFiniteError
from searchrl.config import DType
from searchrl.distributed import World
from searchrl.errors import SearchrlError
from searchrl.offload import Offloaded, storages


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


class UnsafeCheckpointError(SearchrlError, RuntimeError):
    """A checkpoint's file holds more than tensors and plain values; reading it could run code."""


def load_tensors(
    path: str, map_location: Any = None, *, classes: Sequence[Callable[..., object]]
) -> dict[str, Any]:
    """Read a file of a checkpoint without running what a pickle can hold: in place of DeepSpeed's own reader.

    Args:
        path: the file.
        map_location: as for ``torch.load``.
        classes: DeepSpeed's own that its files hold besides tensors and plain values.

    Raises:
        UnsafeCheckpointError: it holds anything else.
    """
    with torch.serialization.safe_globals(list(classes)):
        try:
            loaded: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's own message says above all how to run the code after all.
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise UnsafeCheckpointError(
                f"{path} is damaged, or holds what DeepSpeed did not write and could run code"
                f"{f', {found[1]}' if found else ''}; continue from another checkpoint"
            ) from error
    return loaded


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


def _states(optimizer: Any, zero_stage: int) -> Iterator[Tensor]:
    adamw = optimizer if zero_stage == 0 else optimizer.optimizer
    for state in adamw.state.values():
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
