"""Actor to engine, with proof: after every sync both score the same tokens and must agree.

The probe lets the engine continue fixed prompts for a few tokens, then asks the trainer for the same tokens'
log-probabilities. The prompts are the same every time, so a prefix cache that survived the sync would answer
with old keys and values; the decoded tokens go through every layer and the head. A tensor that was damaged or
left behind, a stale tied head and a stale cache all show up as a difference. ``sync.checksum`` compares the
tensors themselves, and sees what is too small for that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from searchrl.actor import Actor
from searchrl.batching import pack
from searchrl.config import SyncConfig
from searchrl.distributed import gather_objects, reduce_values
from searchrl.engine import Engine, Generation, GenerationRequest
from searchrl.errors import SearchrlError
from searchrl.phases import Events, no_events
from searchrl.trajectory import Outcome, Sample, Trajectory, Turn

Weights = Iterable[tuple[str, Tensor]]


class SyncError(SearchrlError, RuntimeError):
    """Engine and trainer disagree after a sync: training on would learn from another policy's samples."""


@dataclass(kw_only=True, slots=True, frozen=True)
class SyncStats:
    """What a sync did."""

    seconds: float
    """The whole sync, proofs included."""
    load_seconds: float
    """Of it, until the engine held the weights."""
    probe_seconds: float
    megabytes: float
    probe_max_abs_diff: float
    """Largest |Δ log-probability| in nats over all probed tokens and ranks."""

    def metrics(self) -> dict[str, float]:
        """The same under the names of the log."""
        return {
            "sync/seconds": self.seconds,
            "sync/load_seconds": self.load_seconds,
            "sync/probe_seconds": self.probe_seconds,
            "sync/megabytes": self.megabytes,
            "sync/probe_max_abs_diff": self.probe_max_abs_diff,
        }


@dataclass(kw_only=True, slots=True)
class WeightSync:
    """Copies the actor's weights into this rank's engine and proves it."""

    actor: Actor
    engine: Engine
    config: SyncConfig
    temperature: float
    prompts: Sequence[Sequence[int]]
    """Fixed token ids that the probe continues; longer than a cache block, so that a stale cache shows."""
    events: Events = no_events
    """Hears of what was proved."""

    def __call__(
        self,
        runner: asyncio.Runner,
        *,
        version: int,
        tamper: Callable[[Weights], Weights] = lambda weights: weights,
    ) -> SyncStats:
        """Sync, waking the engine if it sleeps, and prove it. A collective.

        Weights are woken first and the key-value cache last: in between, gathered weights take its place.

        Args:
            runner: runs the engine.
            version: stamped on everything that is generated from now on.
            tamper: damages the weights on their way; for tests of the probe.

        Raises:
            SyncError: the difference is above ``sync.probe_max_abs_diff``, or not a number; or a tensor
                differs, if ``sync.checksum`` compares them.
        """
        start = time.perf_counter()
        moved = _Counter()
        self.engine.wake("weights")
        self.engine.load_weights(tamper(moved(self.actor.named_weights())), policy_version=version)
        loaded = time.perf_counter()
        if self.config.checksum:
            self.compare()
        self.engine.wake("kv_cache")
        probed = time.perf_counter()
        difference = self.probe(runner)
        end = time.perf_counter()
        return SyncStats(
            seconds=end - start,
            load_seconds=loaded - start,
            probe_seconds=end - probed,
            megabytes=moved.bytes / 2**20,
            probe_max_abs_diff=difference,
        )

    def compare(self) -> None:
        """Compare every tensor of engine and actor, bit by bit. A collective.

        Raises:
            SyncError: names the tensors that differ, on any rank.
        """
        found = gather_objects(self.engine.differing(self.actor.named_weights()))
        faults = list(dict.fromkeys(fault for faults in found for fault in faults))
        if faults:
            shown = ", ".join(faults[:8]) + (f" and {len(faults) - 8} more" if len(faults) > 8 else "")
            raise SyncError(
                f"after the sync to version {self.engine.policy_version} engine and trainer hold different "
                f"values (sync.checksum=true): {shown}. The engine would sample from another policy"
            )
        self.events("checksum_passed", version=self.engine.policy_version)

    def probe(self, runner: asyncio.Runner) -> float:
        """Largest difference in nats over all ranks; raises ``SyncError`` above the bound. A collective."""
        generations = self.engine.run(runner, self._generate())  # none on ranks that only follow
        samples = [
            _probe_sample(index, prompt, generation)
            for index, (prompt, generation) in enumerate(zip(self.prompts, generations, strict=False))
        ]
        batches = pack(samples, max_tokens=1024)
        worst = 0.0
        for batch, logprobs in zip(batches, self.actor.logprobs(batches), strict=True):
            difference = (logprobs.cpu() - batch.sampling_logprobs[batch.loss_mask]).abs()
            # max() of a tensor with a NaN is NaN, which must not pass as small.
            worst = max(worst, float("inf") if difference.isnan().any() else float(difference.max()))
        worst = reduce_values([worst], "max")[0]
        if worst > self.config.probe_max_abs_diff:
            raise SyncError(
                f"after the sync to version {self.engine.policy_version} engine and trainer differ by "
                f"{worst:.4g} nats in a log-probability; sync.probe_max_abs_diff allows "
                f"{self.config.probe_max_abs_diff:g}. The engine does not hold the trainer's weights, or its "
                "caches are stale; samples from it would be off-policy without anybody noticing"
            )
        self.events("probe_passed", version=self.engine.policy_version, max_abs_diff=worst)
        return worst

    async def _generate(self) -> list[Generation]:
        requests = [
            GenerationRequest(
                prompt_ids=list(prompt),
                max_tokens=self.config.probe_tokens,
                temperature=self.temperature,
                top_p=1.0,
                top_k=0,
                seed=index,
                stop=(),
                ignore_eos=True,
            )
            for index, prompt in enumerate(self.prompts)
        ]
        return await asyncio.gather(*(self.engine.generate(request) for request in requests))


class _Counter:
    """Passes weights through and counts their bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, weights: Weights) -> Weights:
        for name, tensor in weights:
            self.bytes += tensor.numel() * tensor.element_size()
            yield name, tensor


def _probe_sample(index: int, prompt: Sequence[int], generation: Generation) -> Sample:
    turn = Turn(
        token_ids=generation.token_ids,
        logprobs=generation.logprobs,
        text="",
        finish=generation.finish,
        policy_version=0,
    )
    trajectory = Trajectory(prompt_ids=list(prompt), turns=[turn], outcome=Outcome.ABORTED, answer=None)
    return Sample(trajectory=trajectory, advantage=0.0, id=f"probe/{index}")
