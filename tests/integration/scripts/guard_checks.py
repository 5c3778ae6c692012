"""Numbers that are not finite, put into real updates; all ranks must stop first; run by ``update_checks``.

On two ranks only the last is hurt, so that the other has to learn of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from integration.scripts.common import random_samples
from searchrl.actor import Actor
from searchrl.compose import compose_config
from searchrl.config import OptimizerConfig
from searchrl.distributed import World, gather_objects
from searchrl.dumps import dumped
from searchrl.guards import NonFiniteStepError
from searchrl.protocol import load_tokenizer
from searchrl.reference import Reference
from searchrl.trajectory import Sample
from searchrl.update import apply_update, prepare_update

SETTINGS = ("+experiment=smoke", "batching.max_tokens=200", "loss.kl_coef=0")
HALF = (1, 3)
"""ZeRO stages that are tried in bf16, the others in fp32."""
SAMPLES = random_samples(11, 8)


class Bench:
    """An actor and what becomes of an update that is hurt."""

    def __init__(self, out: Path, path: Path, stage: int, world: World) -> None:
        self.out, self.path, self.stage, self.world = out, path, stage, world
        self.is_hurt = world.rank == world.size - 1
        self.settings = [*SETTINGS, f"model.dtype={'bfloat16' if stage in HALF else 'float32'}"]
        cfg, _ = compose_config(self.settings)
        self.actor = Actor(
            path,
            model=cfg.model,
            optimizer=OptimizerConfig(lr=1e-2),
            zero_stage=stage,
            temperature=1.0,
            logprob_chunk=64,
            total_steps=1,
            seed=0,
            world=world,
        )

    def stopped(
        self, name: str, samples: Sequence[Sample], *settings: str, reference: Reference | None = None
    ) -> dict[str, Any]:
        """Make an update, as a run does; what every rank says, and what is left."""
        cfg, resolved = compose_config([*self.settings, *settings])
        run_dir = self.out / "guards" / f"{name}-zero{self.stage}"
        before, message = self.weights(), ""
        guarded = dumped(
            run_dir,
            step=1,
            resolved=resolved,
            world=self.world,
            reference=self.path,
            export=lambda folder: self.actor.export(folder, load_tokenizer(self.path)),
        )
        try:
            with guarded:
                mine = samples[self.world.rank :: self.world.size]
                update = prepare_update(self.actor, reference, mine, cfg=cfg, world=self.world)
                apply_update(update, self.actor, epochs=cfg.update.epochs, step=0)
        except NonFiniteStepError as error:
            message = str(error)
        after = self.weights()
        same = [torch.equal(after[key].nan_to_num(7.0), before[key].nan_to_num(7.0)) for key in before]
        return {
            "messages": gather_objects(message),
            "unchanged": all(gather_objects(all(same))),
            "folder": str(run_dir / "dumps"),
        }

    def weights(self) -> dict[str, Tensor]:
        """Copies."""
        return {name: tensor.clone() for name, tensor in self.actor.named_weights()}

    def break_weight(self) -> None:
        """A weight of the last layer is not a number, in this rank's copy; at ZeRO 3 in its part."""
        weight: Any = self.actor.network.model.layers[1].mlp.up_proj.weight
        if self.is_hurt:
            (weight.ds_tensor if self.stage == 3 else weight).data.view(-1)[0] = math.nan

    @contextmanager
    def broken_gradient(self) -> Iterator[None]:
        """The gradient that leaves the second layer downwards is infinite."""

        def spoil(_: nn.Module, grad_input: Any, grad_output: Any) -> Any:
            return tuple(None if part is None else part + math.inf for part in grad_input)

        layer = self.actor.network.model.layers[1]
        handle = layer.register_full_backward_hook(spoil) if self.is_hurt else None
        yield
        if handle is not None:
            handle.remove()


def with_logprob(sample: Sample, value: float) -> Sample:
    """The engine's log-probability of the first sampled token is ``value``."""
    first, *rest = sample.trajectory.turns
    broken = replace(first, logprobs=[value, *first.logprobs[1:]])
    return replace(sample, trajectory=replace(sample.trajectory, turns=[broken, *rest]))


def check(out: Path, path: Path, world: World) -> dict[str, dict[str, Any]]:
    """Every case on all ranks."""
    results = {}
    for stage in (0, 1, 2, 3):
        bench = Bench(out, path, stage, world)
        if stage == 0:
            spoilt = [*SAMPLES[:5], with_logprob(SAMPLES[5], math.nan), *SAMPLES[6:]]
            results["engine"] = bench.stopped("engine", spoilt)
            infinite = [*SAMPLES[:5], replace(SAMPLES[5], advantage=math.inf), *SAMPLES[6:]]
            results["advantage"] = bench.stopped("advantage", infinite)
            reference = Reference(
                path, model=compose_config(SETTINGS)[0].model, temperature=1.0, logprob_chunk=64, world=world
            )
            if bench.is_hurt:
                reference.network.model.norm.weight.data[0] = math.inf
            results["reference"] = bench.stopped(
                "reference", SAMPLES, "loss.kl_coef=0.1", reference=reference
            )
        with bench.broken_gradient():
            results[f"gradient/zero{stage}"] = bench.stopped("gradient", SAMPLES)
        bench.break_weight()
        results[f"loss/zero{stage}"] = bench.stopped("loss", SAMPLES)
        if stage == 2:
            results["old"] = bench.stopped("old", SAMPLES, "update.epochs=2")
    return results
