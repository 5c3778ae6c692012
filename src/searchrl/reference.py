"""The initial policy as a model of its own, for KL penalties."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchrl.batching import MicroBatch
from searchrl.config import ModelConfig
from searchrl.distributed import World
from searchrl.offload import Offloaded
from searchrl.out_of_memory import run_passes
from searchrl.policy import PolicyModel, load_model, runs_on_trees, token_outputs


class Reference:
    """The frozen initial policy as a model of its own, whole on every rank."""

    def __init__(
        self,
        path: Path | str,
        *,
        model: ModelConfig,
        temperature: float,
        logprob_chunk: int,
        world: World,
        offloads: bool = False,
    ) -> None:
        """Load the model.

        Args:
            path: local folder or hub name.
            model: number format and attention kernels.
            temperature: the sampling temperature, which the log-probabilities share.
            logprob_chunk: loss positions whose logits exist at one time.
            world: this rank.
            offloads: the model is on the device only while it is used.
        """
        network = load_model(path, model).to(world.device).eval().requires_grad_(False)
        self._policy = PolicyModel(network, temperature=temperature, chunk_size=logprob_chunk)
        self._world = world
        self._use_tree = runs_on_trees(model)
        self._offloaded = Offloaded(self._policy.parameters()) if offloads else None

    @property
    def network(self) -> Any:
        """The Hugging Face model."""
        return self._policy.model

    @torch.no_grad()
    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Log-probabilities of each micro-batch's loss tokens, fp32 [N] each. A collective."""

        def run(batch: MicroBatch) -> Tensor:
            return token_outputs(self._policy, batch.to(self._world.device), self._use_tree).logprobs

        if self._offloaded is not None:
            self._offloaded.reload()
        outputs = run_passes(batches, run, zero_stage=0)
        if self._offloaded is not None:
            self._offloaded.release()
        return outputs
