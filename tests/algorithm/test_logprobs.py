"""The chunked head against full logits: values, gradients, peak memory; and the one shift."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from searchrl.algorithm.logprobs import chunked_logprobs, head_positions

HIDDEN, VOCAB = 16, 211


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Full logits, straight from the definition."""
    logits = torch.nn.functional.linear(hidden, weight, bias).to(
        torch.promote_types(weight.dtype, torch.float32)
    )
    distribution = torch.log_softmax(logits / temperature, dim=-1)
    chosen = distribution.gather(1, targets.unsqueeze(1)).squeeze(1)
    return chosen, -(distribution.exp() * distribution).sum(-1)


def make(
    count: int, dtype: torch.dtype = torch.float32, with_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(count)
    hidden = torch.randn(count, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)
    bias = torch.randn(VOCAB, dtype=dtype, requires_grad=True) if with_bias else None
    return hidden, weight, bias, torch.randint(VOCAB, (count,))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize(("count", "chunk"), [(1, 1), (1, 8), (24, 8), (25, 8), (7, 100), (13, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_full_logits(count: int, chunk: int, temperature: float, with_bias: bool) -> None:
    hidden, weight, bias, targets = make(count, with_bias=with_bias)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    logprobs, entropy = chunked_logprobs(hidden, weight, bias, targets, temperature, chunk)
    expected, expected_entropy = naive(hidden, weight, bias, targets, temperature)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy.detach(), atol=1e-5, rtol=0)
    assert not entropy.requires_grad
    upstream = torch.randn(count)
    actual_grads = torch.autograd.grad(logprobs, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for actual, reference in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, reference, atol=1e-5, rtol=1e-5)


def test_gradcheck() -> None:
    hidden, weight, bias, targets = make(5, torch.float64)
    assert bias is not None

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_logprobs(hidden, weight, bias, targets, 0.8, 2)[0]

    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


def test_frozen_weight_gets_no_gradient() -> None:
    hidden, weight, _, targets = make(5)
    weight.requires_grad_(False)
    chunked_logprobs(hidden, weight, None, targets, 1.0, 2)[0].sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_no_tokens_still_reach_every_input() -> None:
    hidden, weight, bias, targets = make(0)
    logprobs, entropy = chunked_logprobs(hidden, weight, bias, targets, 1.0, 8)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert bias is not None
    assert bias.grad is not None
    assert not weight.grad.any()
    assert not bias.grad.any()
    assert hidden.grad is not None


def test_extreme_logits() -> None:
    hidden, weight, _, targets = make(6)
    logprobs, entropy = chunked_logprobs(hidden * 1e4, weight, None, targets, 1.0, 4)
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(entropy).all()
    assert (logprobs <= 0).all()
    assert (entropy >= 0).all()
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_bf16_head_accumulates_its_gradient_in_fp32() -> None:
    """4096 chunks of one token each: a bf16 accumulator would stop growing after about 256 of them."""
    count = 4096
    hidden = torch.ones(count, 2, dtype=torch.bfloat16)
    weight = torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(count, dtype=torch.long)
    logprobs, entropy = chunked_logprobs(hidden, weight, None, targets, 1.0, 1)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logprobs.sum().backward()
    assert weight.grad is not None
    # p = 1/2 for both tokens: each position adds +1/2 to the target's row and -1/2 to the other's.
    assert weight.grad.tolist() == [[2048.0, 2048.0], [-2048.0, -2048.0]]


class _PeakMemory(TorchDispatchMode):
    """The largest number of bytes held at once by storages that appeared under this mode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, tuple[Any, int]] = {}
        self.peak: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_peak_memory_is_bounded_by_chunk_times_vocab(backward: bool) -> None:
    count, hidden_size, vocab, chunk = 512, 8, 4096, 16
    torch.manual_seed(0)
    hidden = torch.randn(count, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    targets = torch.randint(vocab, (count,))

    def peak(chunk_size: int) -> int:
        memory = _PeakMemory()
        with memory:
            logprobs, _ = chunked_logprobs(hidden, weight, None, targets, 0.9, chunk_size)
            if backward:
                torch.autograd.grad(logprobs.sum(), (hidden, weight))
        return memory.peak

    buffers = 2 * chunk * vocab * 4
    extras = 4 * (2 * hidden.numel() + 2 * weight.numel() + 8 * count + 16 * chunk)
    assert peak(chunk) <= buffers + extras
    assert peak(chunk) < count * vocab * 4 / 4, "holding [N, V] would take four times this"
    assert peak(count) >= count * vocab * 4, "the measurement itself sees full logits"


def test_shift() -> None:
    """Row 0: two segments; row 1: one segment and padding."""
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]])
    positions = head_positions(mask, segments)
    assert positions.token.tolist() == [1, 2, 4, 8, 9]
    assert positions.predictor.tolist() == [0, 1, 3, 7, 8]


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 3), (1, 0)])
def test_first_token_of_a_segment_cannot_carry_loss(row: int, column: int) -> None:
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[row, column] = True
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]])
    with pytest.raises(ValueError, match=f"row {row}, column {column}"):
        head_positions(mask, segments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"weight": torch.zeros(5, HIDDEN + 1)}, "hidden"),
        ({"targets": torch.zeros(2, dtype=torch.long)}, "targets"),
        ({"weight": torch.zeros(5, HIDDEN, dtype=torch.bfloat16)}, "bfloat16"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    hidden, weight, bias, targets = make(3)
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "targets": targets,
        "temperature": 1.0,
        "chunk_size": 4,
    }
    with pytest.raises(ValueError, match=message):
        chunked_logprobs(**(arguments | change))
