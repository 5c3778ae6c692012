"""Memory that runs out: told from other errors, what then holds; real steps are ``test_gradients``'s."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from integration.scripts.common import grouped_samples
from searchrl.batching import MicroBatch, pack, pad
from searchrl.out_of_memory import OutOfMemoryError, TokenBudget, is_out_of_memory, run_passes

SAMPLES = grouped_samples(0, groups=2, members=2)
FAR_TOO_MUCH = 2**58


def allocate(batch: MicroBatch) -> Tensor:
    """The allocator's own refusal."""
    return torch.empty(FAR_TOO_MUCH, dtype=torch.uint8)


def allocation_failure() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(FAR_TOO_MUCH, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (allocation_failure(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize(
    ("batches", "can_retry", "message"),
    [
        (pad(SAMPLES, 10_000), True, r"memory ran out in a micro-batch of \d+ tokens$"),
        (pack(SAMPLES, 10_000), True, r"memory ran out in a micro-batch of \d+ tokens$"),
        (pad(SAMPLES, 1), False, "of .* tokens, a single trajectory, which cannot be cut$"),
    ],
)
def test_a_failure_says_what_failed(batches: list[MicroBatch], can_retry: bool, message: str) -> None:
    with pytest.raises(OutOfMemoryError, match=message) as caught:
        run_passes(batches, allocate, zero_stage=0)
    first = batches[0] if batches[0].tree is None else batches[0].tree
    assert (caught.value.tokens, caught.value.can_retry) == (first.input_ids.numel(), can_retry)


def test_inside_collectives_nothing_is_retried() -> None:
    with pytest.raises(OutOfMemoryError, match="inside ZeRO's collectives") as caught:
        run_passes(pad(SAMPLES, 10_000), allocate, zero_stage=3)
    assert not caught.value.can_retry


def test_other_errors_pass() -> None:
    def fail(batch: MicroBatch) -> Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run_passes(pad(SAMPLES, 1), fail, zero_stage=0)


def test_without_failures_every_micro_batch_answers() -> None:
    batches = pad(SAMPLES, 1)
    assert run_passes(batches, lambda batch: batch.input_ids.numel(), zero_stage=0) == [
        batch.input_ids.numel() for batch in batches
    ]


@pytest.mark.parametrize(
    ("budget", "failed", "lowered"),
    [(4096, 4000, 2000), (4096, 9000, 2048), (4096, 90, 45), (1, 1, 1)],
)
def test_the_budget_is_halved(budget: int, failed: int, lowered: int) -> None:
    said: list[str] = []
    held = TokenBudget(tokens=budget, say=said.append)
    held.lower(OutOfMemoryError("memory ran out", tokens=failed, can_retry=True))
    assert held.tokens == lowered
    assert said == [f"memory ran out; again, and from now on, with batching.max_tokens={lowered}"]
    assert (held.take_retries(), held.take_retries()) == (1, 0)


def test_what_cannot_be_cut_ends_the_run() -> None:
    held = TokenBudget(tokens=64)
    with pytest.raises(OutOfMemoryError, match="too long"):
        held.lower(OutOfMemoryError("too long", tokens=100, can_retry=False))
    assert (held.tokens, held.take_retries()) == (64, 0)


@pytest.mark.parametrize(
    ("configured", "expected", "says"),
    [(4096, 2000, ["resume: batching.max_tokens=2000, because memory ran out before"]), (1024, 1024, [])],
)
def test_a_resumed_run_keeps_the_lower_budget_unless_another_is_configured(
    configured: int, expected: int, says: list[str]
) -> None:
    held = TokenBudget(tokens=4096)
    held.lower(OutOfMemoryError("memory ran out", tokens=4000, can_retry=True))
    said: list[str] = []
    resumed = TokenBudget(tokens=configured, say=said.append)
    resumed.load_state_dict(held.state_dict())
    assert (resumed.tokens, said) == (expected, says)
    again = TokenBudget(tokens=configured)  # a run may be resumed more than once
    again.load_state_dict(resumed.state_dict())
    assert again.tokens == expected
