"""The chunked head against full logits: values, gradients, peak memory; and the one shift."""

from __future__ import annotations

import math
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
    count: int,
    dtype: torch.dtype = torch.float32,
    with_bias: bool = True,
    hidden_size: int = HIDDEN,
    vocab: int = VOCAB,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(count)
    hidden = torch.randn(count, hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocab, dtype=dtype, requires_grad=True) if with_bias else None
    return hidden, weight, bias, torch.randint(vocab, (count,))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize(("count", "chunk"), [(1, 1), (1, 8), (24, 8), (25, 8), (7, 100), (13, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_full_logits(count: int, chunk: int, temperature: float, with_bias: bool) -> None:
    hidden, weight, bias, targets = make(count, with_bias=with_bias)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    logprobs, entropy = chunked_logprobs(hidden, weight, bias, targets, temperature, chunk)
    expected, expected_entropy = naive(hidden, weight, bias, targets, temperature)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=0)
    upstream = torch.randn(2, count)
    # Both outputs, as with an entropy bonus; then one alone, whose other gradient is absent, not zero.
    for used in ([0, 1], [0], [1]):
        actual_grads = torch.autograd.grad(
            [(logprobs, entropy)[i] for i in used], inputs, [upstream[i] for i in used], retain_graph=True
        )
        expected_grads = torch.autograd.grad(
            [(expected, expected_entropy)[i] for i in used],
            inputs,
            [upstream[i] for i in used],
            retain_graph=True,
        )
        for actual, reference in zip(actual_grads, expected_grads, strict=True):
            torch.testing.assert_close(actual, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias: bool) -> None:
    """Numerical derivatives of log-probabilities and entropies, in float64."""
    hidden, weight, bias, targets = make(5, torch.float64, with_bias, hidden_size=3, vocab=7)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return chunked_logprobs(hidden, weight, bias, targets, 0.8, 2)

    assert torch.autograd.gradcheck(call, (hidden, weight) if bias is None else (hidden, weight, bias))


def test_entropy_gradient_by_hand() -> None:
    """Logits 0, 0, log 2 at temperature 1/2: scaled 0, 0, log 4, so p = 1/6, 1/6, 2/3.

    H = 2/6·log 6 + 2/3·log 3/2, and dH/dlogit_v = -p_v (log p_v + H) / temperature, 0 in sum.
    """
    hidden = torch.tensor([[1.0]], dtype=torch.float64)
    weight = torch.tensor([[0.0], [0.0], [math.log(2)]], dtype=torch.float64, requires_grad=True)
    _, entropy = chunked_logprobs(hidden, weight, None, torch.tensor([0]), 0.5, 1)
    expected = math.log(6) / 3 + math.log(1.5) * 2 / 3
    (grad,) = torch.autograd.grad(entropy.sum(), weight)
    slopes = [-2 * p * (math.log(p) + expected) for p in (1 / 6, 1 / 6, 2 / 3)]
    assert entropy.item() == pytest.approx(expected)
    assert grad.flatten().tolist() == pytest.approx(slopes)
    assert sum(slopes) == pytest.approx(0.0, abs=1e-12)


def test_the_outputs_of_a_frozen_model_have_no_gradient() -> None:
    hidden, weight, bias, targets = make(5)
    with torch.no_grad():
        outputs = chunked_logprobs(hidden, weight, bias, targets, 1.0, 2)
    assert not any(output.requires_grad for output in outputs)


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
    (logprobs + entropy).sum().backward()
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
    (logprobs + entropy).sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_bf16_head_accumulates_its_gradient_in_fp32() -> None:
    """1024 chunks of one token each: a bf16 accumulator would stop growing after about 256 of them."""
    count = 1024
    hidden = torch.ones(count, 2, dtype=torch.bfloat16)
    weight = torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(count, dtype=torch.long)
    logprobs, entropy = chunked_logprobs(hidden, weight, None, targets, 1.0, 1)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logprobs.sum().backward()
    assert weight.grad is not None
    # p = 1/2 for both tokens: each position adds +1/2 to the target's row and -1/2 to the other's.
    assert weight.grad.tolist() == [[512.0, 512.0], [-512.0, -512.0]]


def test_bf16_equals_full_logits() -> None:
    """The logits are the same bf16 numbers, and everything after them is fp32."""
    hidden, weight, bias, targets = make(24, torch.bfloat16, with_bias=False)
    actual = chunked_logprobs(hidden, weight, bias, targets, 0.7, 8)
    expected = naive(hidden, weight, bias, targets, 0.7)
    for ours, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)
    grads = torch.autograd.grad((actual[0] + 0.1 * actual[1]).sum(), (hidden, weight))
    references = torch.autograd.grad((expected[0] + 0.1 * expected[1]).sum(), (hidden, weight))
    for ours, reference in zip(grads, references, strict=True):
        assert ours.dtype == torch.bfloat16
        # Eight bits of mantissa: 2^-8 of a number, and of the largest terms that it is the sum of.
        torch.testing.assert_close(ours, reference, atol=2**-8 * reference.abs().max().item(), rtol=2**-7)


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


@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, 151_936), (torch.bfloat16, 4096)])
def test_peak_memory_is_bounded_by_chunk_times_vocab(dtype: torch.dtype, vocab: int) -> None:
    """The docstring's account of each pass, in bytes, beside full logits of the same tokens.

    Views of the inputs count as well; what else there is has N or chunk_size rows without V.
    """
    count, chunk, hidden_size = 512, 64, 8
    hidden, weight, _, targets = make(count, dtype, False, hidden_size, vocab)
    rows = chunk * vocab
    converted = rows * dtype.itemsize if dtype != torch.float32 else 0
    accumulator = weight.numel() * (4 + (dtype.itemsize if converted else 0))
    small = hidden.nbytes + weight.nbytes + 4 * (hidden.numel() + 12 * count + 16 * chunk)

    with _PeakMemory() as forward:
        logprobs, entropy = chunked_logprobs(hidden, weight, None, targets, 0.9, chunk)
    assert 2 * 4 * rows + converted <= forward.peak <= 2 * 4 * rows + converted + small

    for loss, buffers in ((logprobs.sum(), 1), ((logprobs + entropy).sum(), 2)):
        with _PeakMemory() as backward:
            torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        allowed = buffers * 4 * rows + converted + accumulator
        assert buffers * 4 * rows <= backward.peak <= allowed + small

    with torch.no_grad(), _PeakMemory() as full:
        naive(hidden, weight, None, targets, 0.9)
    assert full.peak >= 4 * count * vocab >= 4 * forward.peak / 1.3


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
