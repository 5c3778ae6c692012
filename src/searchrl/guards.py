"""Numbers that are not finite: all ranks stop before the optimizer's step, and name the trajectories.

Nothing is repaired and nothing left out: one NaN in a step would be in every weight after it. Whoever finds
one must not stop alone, for the other ranks would wait in the next collective. So a rank remembers its
:class:`Fault`, and all of them stop together where they meet next:

=============================================  ===============================================================
log-probabilities of the engine, advantages    `batch_fault`; after the forward passes before the first step
of trainer and reference, before the steps     `logprob_fault`; the same
log-probabilities and loss during a step       `PolicyObjective`; after all of the step's passes
gradient                                       its norm, which ZeRO computes over all ranks: `zero.check_norm`
=============================================  ===============================================================

`meet` costs one number, reduced. What it raises holds all that is needed to run the micro-batch again; the
trainer has it written down (`dumps`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from searchrl.algorithm.importance import NonFiniteError, check_finite
from searchrl.batching import MicroBatch
from searchrl.distributed import gather_objects, reduce_values
from searchrl.trajectory import Sample

KnownValues = dict[str, dict[str, list[float]]]
"""What was known of trajectories before the step, by name (``old_logprobs``) and trajectory."""

_MOST_NAMES = 12


@dataclass(slots=True, frozen=True)
class Fault:
    """Something in a micro-batch of one rank that is not finite."""

    message: str
    """What, where it came from, in which trajectories."""
    ids: Sequence[str]
    """All trajectories of the micro-batch; for a gradient, of all the rank's micro-batches of the step."""
    source: str = "loss"
    """``samples``, ``trainer`` or ``reference`` (before the first step), ``loss``, ``gradient``."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Evidence:
    """What it takes to run a micro-batch again, besides weights and configuration."""

    fault: Fault
    samples: Sequence[Sample]
    known: KnownValues
    denominator: float | None
    """What the step's loss is divided by; None before it is known."""


class NonFiniteStepError(NonFiniteError):
    """No optimizer step is made, because something is not finite. Every rank raises it."""

    def __init__(
        self, faults: Sequence[Fault | None], evidence: Evidence | None, *, remark: str = ""
    ) -> None:
        """Say what was found.

        Args:
            faults: of each rank.
            evidence: this rank's, if it has a fault.
            remark: stands at the end of the message.
        """
        found = [(rank, fault) for rank, fault in enumerate(faults) if fault is not None]
        lines = [
            f"{f'rank {rank}: ' * (len(faults) > 1)}{fault.message} (micro-batch: {_listed(fault.ids)})"
            for rank, fault in found
        ]
        super().__init__("stopped before the optimizer's step: " + "\n".join(lines) + remark)
        self.faults = faults
        self.evidence = evidence


def batch_fault(batches: Iterable[MicroBatch]) -> Fault | None:
    """The first micro-batch with a log-probability of the engine, or an advantage, that is not finite."""
    for batch in batches:
        index, ids = batch.trajectory_index[batch.loss_mask], batch.trajectory_ids
        try:
            check_finite(batch.sampling_logprobs[batch.loss_mask], "engine", index, ids)
        except NonFiniteError as error:
            return Fault(str(error), ids, "samples")
        bad = sorted(set(index[~torch.isfinite(batch.advantages[batch.loss_mask])].tolist()))
        if bad:
            names = ", ".join(ids[number] for number in bad)
            return Fault(f"the advantage is NaN or infinite in trajectories {names}", ids, "samples")
    return None


def logprob_fault(source: str, batches: Iterable[MicroBatch], values: Iterable[Tensor]) -> Fault | None:
    """The first micro-batch with a log-probability of ``source`` that is not finite.

    Args:
        source: ``trainer`` or ``reference``.
        batches: the micro-batches.
        values: of their loss tokens, [N] each.
    """
    for batch, logprobs in zip(batches, values, strict=True):
        index = batch.trajectory_index[batch.loss_mask].to(logprobs.device)
        try:
            check_finite(logprobs, source, index, batch.trajectory_ids)
        except NonFiniteError as error:
            return Fault(str(error), batch.trajectory_ids, source)
    return None


def meet(
    fault: Fault | None,
    samples: Iterable[Sample],
    known: Callable[[Sequence[str]], KnownValues],
    denominator: float | None = None,
) -> None:
    """Go on, or stop on every rank if any has a fault. A collective.

    Args:
        fault: this rank's.
        samples: this rank's; those of the fault are evidence.
        known: what is known of trajectories of these ids.
        denominator: of the step's loss.

    Raises:
        NonFiniteStepError: on all ranks.
    """
    if not reduce_values([float(fault is not None)], "max")[0]:
        return
    evidence = None
    if fault is not None:
        ids = set(fault.ids)
        evidence = Evidence(
            fault=fault,
            samples=[sample for sample in samples if sample.id in ids],
            known=known(fault.ids),
            denominator=denominator,
        )
    raise NonFiniteStepError(gather_objects(fault), evidence)


def _listed(ids: Sequence[str]) -> str:
    more = len(ids) - _MOST_NAMES
    return ", ".join(ids[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
