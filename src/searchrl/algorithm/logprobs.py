"""Log-probabilities of loss tokens: the one shift by a position, and the head in chunks.

The language-model head is the largest activation of a step: [T, V] fp32 logits for 16k tokens and a
vocabulary of 152k take 10 GB. Only sampled tokens need it, and each needs two numbers of it, so it runs over
chunks of the loss positions and recomputes each chunk's logits in backward: one extra matmul instead of the
memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class HeadPositions:
    """Where the head runs, as indices into a micro-batch flattened from [B, T] to [B·T].

    Both are long [N], N = loss tokens of the micro-batch, in row-major order of the tokens.
    """

    predictor: Tensor
    """[N] whose hidden state predicts the token: always ``token - 1``."""
    token: Tensor
    """[N] the loss tokens; index ``input_ids``, ``advantages`` and all else about a token with these."""


def head_positions(loss_mask: Tensor, segment_ids: Tensor) -> HeadPositions:
    """The single place where the shift by one position happens: the hidden state at t - 1 predicts token t.

    Args:
        loss_mask: bool [B, T], True where token t carries loss.
        segment_ids: long [B, T], which sequence of the row a token belongs to.

    Returns:
        Flat indices of the loss tokens and of their predictors.

    Raises:
        ValueError: a loss token begins its sequence. Nothing predicts it; the hidden state before it belongs
            to another sequence, or to another row.
    """
    starts = torch.ones_like(loss_mask)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    if bool((starts & loss_mask).any()):
        row, column = (starts & loss_mask).nonzero()[0].tolist()
        raise ValueError(
            f"the loss token at row {row}, column {column} begins its sequence, so no hidden state "
            "predicts it; give every trajectory a prompt of at least one token"
        )
    token = loss_mask.reshape(-1).nonzero().squeeze(-1)
    return HeadPositions(predictor=token - 1, token=token)


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, without ever holding [N, V].

    ``logprobs = log_softmax(float32(hidden @ weight.T + bias) / temperature)[targets]``: the matmul runs in
    the weight's dtype and the rest in fp32, the order of operations of the sampling engine. Transient memory
    is two fp32 buffers of chunk_size × V in forward; in backward one, or two if the loss depends on the
    entropy, plus the fp32 accumulator [V, H] of the weight's gradient. A weight of another dtype adds one
    chunk_size × V buffer of that dtype to both, and to backward a [V, H]: one chunk's share of the gradient,
    at the end all of it.

    Under ZeRO-3 the weight is whole only while its module's hooks are active, in forward and again in
    backward. So call this inside ``forward`` of the module that owns the parameter (or has registered it as
    external), and pass the parameter itself: a detached or transposed copy would not be gathered again. N = 0
    is valid and yields zero gradients for every input, so that a rank without loss tokens takes part in every
    collective.

    Args:
        hidden: [N, H] hidden states of the predictors, of the weight's dtype.
        weight: [V, H] the head's weight.
        bias: [V] or None.
        targets: long [N] token ids, below V.
        temperature: the sampling temperature, above 0.
        chunk_size: rows of logits held at once.

    Returns:
        ``(logprobs [N], entropy [N])`` in fp32 (float64 if the weight is), both with gradient; entropy in
        nats, at the sampling temperature.

    Raises:
        ValueError: temperature or chunk_size not positive, or shapes or dtypes that disagree.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden [N, H] and weight [V, H], got {list(hidden.shape)}, {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need targets [N], got {list(targets.shape)} for hidden {list(hidden.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast one of them")
    result = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        hidden, weight, bias, targets, temperature, chunk_size
    )
    return cast("tuple[Tensor, Tensor]", result)


def _scaled_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, out: Tensor
) -> Tensor:
    """Write one chunk's logits [n, V] into the fp32 buffer ``out`` [n, V] and return it."""
    if weight.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        out.copy_(hidden @ weight.t())
    if bias is not None:
        out += bias
    if temperature != 1.0:
        out /= temperature
    return out


class _ChunkedLogprobs(torch.autograd.Function):
    """See :func:`chunked_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        count, vocab = hidden.shape[0], weight.shape[0]
        precise = torch.promote_types(weight.dtype, torch.float32)
        # Buffers are allocated once: on a CPU, fresh pages for every chunk cost as much as the softmax.
        logits_buffer = hidden.new_empty(min(chunk_size, count), vocab, dtype=precise)
        exp_buffer = torch.empty_like(logits_buffer)
        logprobs = hidden.new_empty(count, dtype=precise)
        entropy = torch.empty_like(logprobs)
        normalizer = torch.empty_like(logprobs)
        for start in range(0, count, chunk_size):
            part = slice(start, min(start + chunk_size, count))
            size = part.stop - start
            logits = _scaled_logits(hidden[part], weight, bias, temperature, logits_buffer[:size])
            peak = logits.amax(dim=-1, keepdim=True)
            logits -= peak
            exps = torch.exp(logits, out=exp_buffer[:size])
            total = exps.sum(dim=-1)
            log_total = total.log()
            logprobs[part] = logits.gather(1, targets[part].unsqueeze(1)).squeeze(1) - log_total
            # H = -Σ p (logit - log Z) = log Z - Σ p·logit, with logits relative to their peak.
            entropy[part] = log_total - torch.mul(exps, logits, out=exps).sum(dim=-1) / total
            normalizer[part] = peak.squeeze(1) + log_total
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)  # an output that the loss does not use costs nothing in backward
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        temperature, chunk_size = ctx.temperature, ctx.chunk_size
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        count, vocab = hidden.shape[0], weight.shape[0]
        precise = normalizer.dtype
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=precise) if needs_bias else None
        buffer = hidden.new_empty(min(chunk_size, count), vocab, dtype=precise)
        factor_buffer = torch.empty_like(buffer) if grad_entropy is not None else buffer[:0]
        scale = torch.zeros_like(normalizer) if grad_logprobs is None else grad_logprobs / temperature
        for start in range(0, count, chunk_size):
            part = slice(start, min(start + chunk_size, count))
            size = part.stop - start
            grad = _scaled_logits(hidden[part], weight, bias, temperature, buffer[:size])
            # d logprob / d logit_v = [v = target] - p_v; d entropy / d logit_v = -p_v (log p_v + entropy).
            grad -= normalizer[part].unsqueeze(1)  # log p, without a reduction
            factor = -scale[part].unsqueeze(1)
            if grad_entropy is not None:
                surprise = torch.add(grad, entropy[part].unsqueeze(1), out=factor_buffer[:size])
                factor = surprise.mul_(-grad_entropy[part].unsqueeze(1) / temperature).add_(factor)
            grad.exp_().mul_(factor)
            grad.scatter_add_(1, targets[part].unsqueeze(1), scale[part].unsqueeze(1))
            low = grad.to(weight.dtype)  # fp32 products are ten times slower on a GPU
            if grad_hidden is not None:
                grad_hidden[part] = low @ weight
            if grad_weight is not None and weight.dtype == precise:
                grad_weight.addmm_(low.t(), hidden[part])
            elif grad_weight is not None:
                grad_weight += low.t() @ hidden[part]
            del low  # the next chunk's logits take its place
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None
