"""``searchrl replay``: runs what a guard stopped again, trajectory by trajectory, and looks where it begins.

One process, no engine and no DeepSpeed: the policy's weights, the same objective, one trajectory a pass, so
that a number that is not finite shows in the trajectory that it comes from. Hooks on every module find the
first output, and in the backward pass the first gradient, that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from searchrl.batching import make_batches
from searchrl.console import Console
from searchrl.dumps import Dump, read_dump
from searchrl.objective import KnownTerms, PolicyObjective, make_objective
from searchrl.policy import PolicyModel, load_model, runs_on_trees, token_outputs
from searchrl.trajectory import Sample

COLUMNS = ("trajectory", "tokens", "advantage", "engine", "here", "max |diff|", "loss", "gradient")
"""Of the table: log-probabilities are means over sampled tokens, the gradient a norm."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Figures:
    """One trajectory, run alone."""

    id: str
    tokens: int
    advantage: float
    engine: float
    """Mean log-probability of a sampled token, as the engine gave it."""
    here: float
    """The same, recomputed."""
    max_diff: float
    """Largest difference of the two."""
    loss: float
    """Its share of the step's loss."""
    gradient: float
    """Norm of the gradient of that share; NaN where the loss is not finite."""
    fault: str
    """What is not finite; empty: nothing."""
    reached_backward: bool
    """The forward pass and the loss were finite."""

    @property
    def row(self) -> list[str]:
        """As `COLUMNS`."""
        numbers = (self.advantage, self.engine, self.here, self.max_diff, self.loss, self.gradient)
        return [self.id, str(self.tokens), *(f"{number:.4g}" for number in numbers)]


class FirstNonFinite:
    """Watches a model's modules; remembers the first, in the order of computation, that breaks."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = ""
        """Of the forward pass, a sentence; empty: every module's output is finite."""
        self.backward = ""
        """Of the backward pass."""
        self._handles = [
            module.register_forward_hook(self._hook(name or "the model"))
            for name, module in model.named_modules()
        ]

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            what, outputs = f"{name} ({type(module).__name__})", _tensors(output)
            broken = sum(map(_count, outputs))
            if broken and not self.forward:
                total = sum(tensor.numel() for tensor in outputs)
                own = sum(_count(parameter) for parameter in module.parameters(recurse=False))
                arrived = "is not finite either" if sum(map(_count, _tensors(inputs))) else "is finite"
                self.forward = (
                    f"the first output that is not finite is that of {what}, {broken} of {total} numbers; "
                    f"its input {arrived}, and {own} of its own weights are not"
                )
            for tensor in outputs:
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._on_gradient(gradient, what))

        return look

    def _on_gradient(self, gradient: Tensor, what: str) -> None:
        broken = _count(gradient)
        if broken and not self.backward:
            self.backward = (
                "the first gradient that is not finite, from the loss downwards, is that of the output of "
                f"{what}, {broken} of {gradient.numel()} numbers"
            )


def replay(folder: Path, *, model: str | None, device: str) -> list[Figures]:
    """Run a dump again and print what came out.

    Args:
        folder: ``runs/NAME/dumps/step-N.rankR``.
        model: weights to use in place of those that the stop has saved: a folder or hub name.
        device: ``cpu`` or ``cuda``.

    Returns:
        The figures of every trajectory.

    Raises:
        DumpError: there is no dump in ``folder``.
    """
    dump, console = read_dump(folder), Console(enabled=True)
    fault = dump.evidence.fault
    is_reference = fault.source == "reference"
    weights = model or (dump.reference if is_reference else str(dump.model))
    console.say(f"step {dump.step}: {fault.message}\nweights: {weights}")
    policy = _load(dump, weights, device)
    objective = _objective(dump, device)
    with _watched(policy) as first:
        figures = [_figures(policy, objective, sample, dump, device) for sample in dump.evidence.samples]
    console.table("each trajectory alone", COLUMNS, [each.row for each in figures])
    for each in figures:
        if each.fault:
            console.say(f"{each.id}: {each.fault}")
    console.say(f"forward: {first.forward or 'every output is finite'}")
    reached = any(each.reached_backward for each in figures)
    nothing = "every gradient is finite" if reached else "not reached"
    console.say(f"backward: {first.backward or nothing}")
    if not any(each.fault for each in figures) and fault.source != "gradient":
        together = _together(policy, objective, dump, device)
        console.say(f"alone all are finite; together in one micro-batch: {together or 'finite as well'}")
    return figures


def _load(dump: Dump, weights: str, device: str) -> PolicyModel:
    network = load_model(weights, dump.cfg.model).to(device).train()
    return PolicyModel(
        network,
        temperature=dump.cfg.sampling.temperature,
        chunk_size=dump.cfg.batching.logprob_chunk,
    )


def _objective(dump: Dump, device: str) -> PolicyObjective:
    known = {
        name: {sample: torch.tensor(values, device=device) for sample, values in entries.items()}
        for name, entries in dump.evidence.known.items()
    }
    objective = make_objective(dump.cfg)
    # Without π_old the policy was π_old itself, or the steps had not begun.
    is_current = objective.old_is_current and "old_logprobs" not in known
    return replace(objective, known=KnownTerms(**known), old_is_current=is_current)


@contextmanager
def _watched(policy: PolicyModel) -> Iterator[FirstNonFinite]:
    first = FirstNonFinite(policy.model)
    try:
        yield first
    finally:
        first.close()


def _figures(
    policy: PolicyModel, objective: PolicyObjective, sample: Sample, dump: Dump, device: str
) -> Figures:
    """Forward and backward pass of one trajectory."""
    (batch,) = make_batches([sample], dump.cfg, len(sample.trajectory.token_ids))
    batch = batch.to(device)
    attempt = replace(objective, loss_sum=0.0, sums={})
    outputs = token_outputs(policy, batch, runs_on_trees(dump.cfg.model))
    loss = attempt(outputs) / (dump.evidence.denominator or 1.0)
    engine = batch.sampling_logprobs[batch.loss_mask]
    here = outputs.logprobs.detach()
    gradient = math.nan
    if attempt.fault is None and loss.requires_grad:
        parameters = [p for p in policy.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        gradient = float(torch.stack([part.float().norm() for part in gradients]).norm())
    fault = "" if attempt.fault is None else attempt.fault.message
    if not fault and not math.isfinite(gradient):
        fault = f"the gradient's norm is {gradient:g}, though the loss is finite"
    return Figures(
        id=sample.id,
        tokens=len(here),
        advantage=sample.advantage,
        engine=float(engine.mean()),
        here=float(here.mean()),
        max_diff=float((engine - here).abs().max()),
        loss=math.nan if attempt.fault is not None else float(loss.detach()),
        gradient=gradient,
        fault=fault,
        reached_backward=attempt.fault is None,
    )


def _together(policy: PolicyModel, objective: PolicyObjective, dump: Dump, device: str) -> str:
    """What is not finite when all trajectories run in one micro-batch, as they did; empty: nothing."""
    samples = dump.evidence.samples
    room = len(samples) * max(len(sample.trajectory.token_ids) for sample in samples)
    attempt = replace(objective, loss_sum=0.0, sums={})
    with torch.no_grad():
        for batch in make_batches(samples, dump.cfg, room):
            attempt(token_outputs(policy, batch.to(device), runs_on_trees(dump.cfg.model)))
    return "" if attempt.fault is None else attempt.fault.message


def _tensors(value: Any) -> list[Tensor]:
    """Tensors of floating point in what a module takes or returns."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _count(tensor: Tensor) -> int:
    """How many numbers of it are not finite."""
    return int((~torch.isfinite(tensor.detach())).sum())
