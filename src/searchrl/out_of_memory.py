"""Memory that runs out in a micro-batch: all ranks learn of it, nothing of the attempt stays, less is tried.

A backward pass that ran out has added a part of its gradients, so the whole optimizer step is made again,
from smaller micro-batches: gradients do not depend on how the work is cut. Ranks have to agree on it before
the next collective, or those that go on would wait for the one that failed for ever:

- ZeRO 0 and 1 have no collective before the optimizer step: ranks meet once, after all their passes.
- ZeRO 2 reduces inside backward passes: ranks meet before each of them. If memory runs out inside one, the
  others are waiting already: with several ranks that ends the run.
- ZeRO 3 gathers parameters inside every pass: that always ends the run.

"Ends the run" is an error on the rank that failed; the launcher then stops the others.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from searchrl.batching import MicroBatch
from searchrl.distributed import World, reduce_values
from searchrl.errors import SearchrlError

T = TypeVar("T")

_MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Of errors that have no type of their own: torch's allocator on a CPU, cuBLAS without room for itself."""


class OutOfMemoryError(SearchrlError, RuntimeError):
    """Memory ran out in a micro-batch."""

    def __init__(self, message: str, *, tokens: int, can_retry: bool) -> None:
        """Args: the message; ``tokens`` and ``can_retry`` as below."""
        super().__init__(message)
        self.tokens = tokens
        """What the model computed in the largest micro-batch that failed, over all ranks."""
        self.can_retry = can_retry
        """Every rank raises this, has no gradients left, and could cut what failed into smaller parts."""


@dataclass(kw_only=True, slots=True)
class TokenBudget:
    """Tokens of one micro-batch, halved for the rest of the run whenever memory runs out."""

    tokens: int
    say: Callable[[str], None] = lambda _: None
    """Tells a person."""
    configured: int = field(init=False)
    """What it began with: ``batching.max_tokens``."""
    _retries: int = 0

    def __post_init__(self) -> None:
        """Remember what was configured."""
        self.configured = self.tokens

    def lower(self, failure: OutOfMemoryError) -> None:
        """Half of what failed; alike on all ranks.

        Raises:
            OutOfMemoryError: ``failure``, if smaller micro-batches cannot help.
        """
        if not failure.can_retry:
            raise failure
        # Half of a budget that nothing filled would fail again.
        self.tokens = max(1, min(self.tokens, failure.tokens) // 2)
        self._retries += 1
        self.say(f"{failure}; again, and from now on, with batching.max_tokens={self.tokens}")

    def state_dict(self) -> dict[str, int]:
        """What ``load_state_dict`` needs: how work is cut decides how sums are rounded."""
        return {"configured": self.configured, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with a saved budget, unless another one has been configured since."""
        if state["configured"] == self.configured and state["tokens"] < self.tokens:
            self.tokens = state["tokens"]
            self.say(f"resume: batching.max_tokens={self.tokens}, because memory ran out before")

    def take_retries(self) -> int:
        """How often it was lowered since this was last asked."""
        retries, self._retries = self._retries, 0
        return retries


def run_passes(batches: Sequence[MicroBatch], run: Callable[[MicroBatch], T], *, zero_stage: int) -> list[T]:
    """``run`` of each micro-batch, if memory suffices on all ranks. A collective below ZeRO 3.

    Args:
        batches: this rank's; ranks may have different numbers.
        run: contains no collective below ZeRO 3.
        zero_stage: of the parameters that ``run`` reads.

    Raises:
        OutOfMemoryError: on every rank; at ZeRO 3 on the one that failed.
    """
    outputs: list[T] = []
    failed = None
    for batch in batches:
        try:
            outputs.append(run(batch))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = batch
            break
    # Past the handler: the error's traceback has kept the activations alive.
    if zero_stage == 3:
        if failed is not None:
            raise _lonely(failed)
        return outputs
    tokens, single = _meet(failed)
    if tokens:
        del outputs
        _free()
        remedy = ", a single trajectory, which cannot be cut" if single else ""
        message = f"memory ran out in a micro-batch of {tokens:,} tokens{remedy}"
        raise OutOfMemoryError(message, tokens=tokens, can_retry=not single)
    return outputs


def accumulate(
    engine: Any,
    batches: Sequence[MicroBatch],
    loss_of: Callable[[MicroBatch], Tensor],
    *,
    zero_stage: int,
    world: World,
) -> None:
    """Forward and backward passes; their gradients add up in DeepSpeed's ``engine``. A collective.

    Args:
        engine: with caller-owned accumulation (``managed_gradient_accumulation=false``).
        batches: as many on every rank from ZeRO 2 on.
        loss_of: the forward pass.
        zero_stage: of the engine.
        world: this rank.

    Raises:
        OutOfMemoryError: memory ran out; no gradient is left in the engine if it can be retried.
    """

    def backward(losses: list[Tensor], _: MicroBatch) -> None:
        # Taken out of the list, so that nobody keeps a failed pass's activations alive.
        engine.backward(losses.pop(), scale_wrt_gas=False)

    try:
        if zero_stage != 2:
            run_passes(batches, lambda batch: backward([loss_of(batch)], batch), zero_stage=zero_stage)
            return
        inside = 2 if world.size == 1 else 3  # with other ranks a backward pass is one of their collectives
        for batch in batches:
            losses = run_passes([batch], loss_of, zero_stage=2)
            run_passes([batch], partial(backward, losses), zero_stage=inside)
    except OutOfMemoryError as failure:
        if failure.can_retry:
            drop_gradients(engine, zero_stage)
        raise


def drop_gradients(engine: Any, zero_stage: int) -> None:
    """Forget all that backward passes since the last optimizer step have left in ``engine``, below ZeRO 3.

    Read in DeepSpeed 0.19's ``stage_1_and_2.py``: besides gradients, an interrupted backward pass leaves
    parameters in the bucket that would be reduced with the next one's, marks of those already reduced, this
    rank's share of finished micro-batches (``all_grad_tensors``), and the depth of passes under way.
    """
    engine.zero_grad()
    if zero_stage > 0:
        optimizer = engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear()
        optimizer.extra_large_param_to_reduce.clear()
        optimizer.params_already_reduced = [False] * len(optimizer.params_already_reduced)
        optimizer.all_grad_tensors.clear()
        optimizer.averaged_gradients.clear()
        optimizer._release_ipg_buffers()
        optimizer._backward_active_depth = 0
    _free()


def is_out_of_memory(error: BaseException) -> bool:
    """True if the error says that memory could not be allocated."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def _meet(failed: MicroBatch | None) -> tuple[int, bool]:
    """Over all ranks: tokens of the largest micro-batch that failed, 0 if none has; if one cannot be cut."""
    sizes = [0.0, 0.0] if failed is None else [float(_tokens(failed)), float(_trajectories(failed) < 2)]
    tokens, single = reduce_values(sizes, "max")
    return int(tokens), bool(single)


def _lonely(failed: MicroBatch) -> OutOfMemoryError:
    """For a rank that cannot tell the others."""
    tokens = _tokens(failed)
    return OutOfMemoryError(
        f"memory ran out in a micro-batch of {tokens:,} tokens, inside ZeRO's collectives, where the step "
        "cannot be made again",
        tokens=tokens,
        can_retry=False,
    )


def _tokens(batch: MicroBatch) -> int:
    """What the model computes."""
    return batch.input_ids.numel() if batch.tree is None else batch.tree.input_ids.numel()


def _trajectories(batch: MicroBatch) -> int:
    return sum(len(row) for row in batch.sample_ids)


def _free() -> None:
    """Give memory that nothing uses back to the device, in one piece."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
