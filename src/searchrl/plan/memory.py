"""Memory of each rank by phase and component.

Exact, given the model's shape: weights, optimizer, key-value cache. With Ψ parameters of b bytes, of which
Ψ_t are trained, N ranks, ZeRO stage s:

- AdamW keeps 8 bytes a trained parameter in fp32, and where ZeRO works (s ≥ 1) a master copy of 4 more; they
  are split over N. Weights are bΨ (bΨ/N at stage 3), gradients bΨ_t (bΨ_t/N from stage 2 on). In bf16 that
  is the 16 bytes a parameter of the ZeRO paper (arXiv 1910.02054, section 3.1).
- An engine over t ranks (tensor_parallel) splits weights and heads over them; the cache is given per rank.
- A token's keys and values: 2 · layers · kv_heads · head_dim · b.

Estimates, marked as such where they are printed:

- What a layer keeps of a token for its backward pass, after arXiv 2205.05198 (section 4.1), but for this
  architecture: two norms, which compute in fp32, 2h(4 + 2b); queries, repeated keys and values, and the
  attention's result twice, 5ab; the gated MLP, 4ib (h hidden, a heads · head_dim, i intermediate). In packed
  rows four of the five are looked up along each trajectory, half again as many tokens where a prompt is
  shared and lengths differ a little (``attention``). With gradient checkpointing a layer
  keeps its input, hb a token, and one layer at a time the rest. Without gradients only that layer is there.
- The head in chunks of C positions: two fp32 buffers [C, V] in the forward pass; in the backward pass one
  (two with an entropy bonus) and, where the head is trained, the fp32 accumulator [V, h] of its gradient;
  below fp32 also a buffer and the result in b bytes (``algorithm.logprobs``, measured by
  benchmarks/update/head.py).
- The engine at work: its widest activations for one step's tokens, and three fp32 copies of the logits that
  it samples from. A packed copy of a tied head, which CPUs keep beside the embedding, counts as weights.
- What ZeRO-3 gathers for use, at most; of a weight with adapters the merged copy.

What lives when: see ``Residency``. Not counted: Python and its libraries, CUDA's context and graphs, what
allocators hold in reserve, the warm start (over before the engine starts), the retriever's process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from searchrl.config import Attention, Config, Device, DType
from searchrl.model_shape import ModelShape

GIB = 2**30
REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default ``reduce_bucket_size``: where ZeRO collects gradients before it reduces them."""
ZERO3_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default ``stage3_max_live_parameters``: gathered at one time at most."""
SYNC_BUCKET_ELEMENTS = 64 * 2**20
"""The actor's: gathered at one time on the way to the engine under ZeRO-3."""


class Phase(StrEnum):
    """What a rank does, in the order of a step; an evaluation is a rollout."""

    load = "load"
    """Everything has been built, nothing has run."""
    rollout = "rollout"
    logprob = "logprob"
    """Forward passes of the trainer before the update."""
    update = "update"
    """Forward and backward passes."""
    step = "step"
    """The optimizer's, when activations are gone."""
    sync = "sync"
    """Weights to the engine, and the probe."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Residency:
    """Which parts leave a device while others work there."""

    engine_sleeps: bool
    """Engine weights and key-value cache exist in rollout and sync only."""
    optimizer_offloads: bool
    """Master weights and moments are in host memory during rollout and sync, the reference while unused."""


def residency(cfg: Config) -> Residency:
    """Of a run: where engine and trainer take turns they make room for one another."""
    return Residency(engine_sleeps=cfg.takes_turns, optimizer_offloads=cfg.takes_turns)


@dataclass(kw_only=True, slots=True, frozen=True)
class Component:
    """One part of the memory: a row of the table."""

    name: str
    amounts: Mapping[Phase, int]
    """Bytes by phase; it is not there in others."""
    is_estimate: bool = False
    note: str = ""


@dataclass(kw_only=True, slots=True, frozen=True)
class MemoryPlan:
    """Bytes of one rank. See the module's docstring for the formulas."""

    components: tuple[Component, ...]
    kv_tokens: int
    """Tokens (no bytes) that the cache holds."""
    offloaded: int
    """Host memory that offloading takes."""

    @property
    def phases(self) -> list[Phase]:
        """Those of the run: an evaluation has two."""
        return [phase for phase in Phase if any(phase in part.amounts for part in self.components)]

    def total(self, phase: Phase, *, estimates: float = 1.0) -> int:
        """Bytes of a phase, the estimated ones times ``estimates``."""
        parts = [(part.amounts.get(phase, 0), part.is_estimate) for part in self.components]
        return int(sum(size * (estimates if estimated else 1.0) for size, estimated in parts))

    @property
    def peak_phase(self) -> Phase:
        """The one that needs most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.total(self.peak_phase)

    def amount(self, name: str, phase: Phase) -> int:
        """Bytes of the component of that name in ``phase``."""
        return next((part.amounts.get(phase, 0) for part in self.components if part.name == name), 0)


def plan_memory(cfg: Config, shape: ModelShape, *, world_size: int, training: bool = True) -> MemoryPlan:
    """Memory of one of ``world_size`` ranks; without ``training``, of an evaluation."""
    kept = residency(cfg)
    cache = int(cfg.engine.kv_cache_gib * GIB)
    block = cfg.engine.block_size * kv_bytes_per_token(cfg, shape)
    kv_tokens = cache // block * cfg.engine.block_size
    sequences = kv_tokens // cfg.episode.max_context_tokens
    note = f"{kv_tokens:,} tokens, {sequences:,} full-length sequences"
    phases: Iterable[Phase] = Phase
    awake: Iterable[Phase] = (Phase.rollout, Phase.sync) if kept.engine_sleeps else Phase
    if not training:
        phases = awake = (Phase.load, Phase.rollout)
    components = [
        _part("engine weights", engine_weights(cfg, shape), awake),
        _part("key-value cache", cache, awake, note=note),
        _part("engine at work", engine_work(cfg, shape), (Phase.rollout,), is_estimate=True),
    ]
    offloaded = 0
    if training:
        components += _trainer(cfg, shape, world_size, kept)
        if kept.optimizer_offloads:
            offloaded = optimizer_states(cfg, trained_parameters(cfg, shape), world_size)
            offloaded += reference(cfg, shape)
    components = [part for part in components if any(part.amounts.values())]
    assert all(phase in phases for part in components for phase in part.amounts)
    return MemoryPlan(components=tuple(components), kv_tokens=kv_tokens, offloaded=offloaded)


def _trainer(cfg: Config, shape: ModelShape, world_size: int, kept: Residency) -> list[Component]:
    """What training adds to the engine."""
    trained, lora = trained_parameters(cfg, shape), cfg.model.lora.rank > 0
    total = trained + (shape.parameters if lora else 0)
    here = [phase for phase in Phase if phase not in (Phase.rollout, Phase.sync)]
    states = here if kept.optimizer_offloads else Phase
    passes, backward = (Phase.logprob, Phase.update), (Phase.update, Phase.step)
    used = (Phase.load, Phase.logprob) if kept.optimizer_offloads else Phase
    adam = "fp32 master weights and moments" if cfg.deepspeed.zero_stage else "moments"
    checkpointing = "" if cfg.model.gradient_checkpointing else "far less with gradient_checkpointing"
    chunk = f"{cfg.batching.logprob_chunk:,} positions at a time"
    return [
        _part("parameters", trainer_parameters(cfg, total, world_size), Phase),
        _part("gathered by ZeRO-3", gathered(cfg, shape, total, world_size), passes, is_estimate=True),
        _part("optimizer", optimizer_states(cfg, trained, world_size), states, note=adam),
        _part("reference model", reference(cfg, shape), used, note="loss.kl_coef=0 loads none"),
        _part("gradients", gradients(cfg, trained, world_size), backward),
        _part("ZeRO's bucket", reduce_buffer(cfg, trained), (Phase.update,)),
        Component(
            name="activations",
            amounts={Phase.logprob: layer_activations(cfg, shape), Phase.update: activations(cfg, shape)},
            is_estimate=True,
            note=checkpointing,
        ),
        Component(
            name="head",
            amounts={Phase.logprob: head(cfg, shape)[0], Phase.update: max(head(cfg, shape))},
            is_estimate=True,
            note=chunk,
        ),
        _part("fp32 gradients", step_gradients(cfg, trained, world_size), (Phase.step,)),
        _part("sync bucket", sync_bucket(cfg, shape, total, world_size), (Phase.sync,), is_estimate=True),
    ]


def reference(cfg: Config, shape: ModelShape) -> int:
    """Whole on every rank, where a KL term needs it; adapters have theirs for free."""
    if cfg.loss.kl_coef == 0 or cfg.model.lora.rank:
        return 0
    return shape.parameters * _size(cfg.model.dtype)


def _part(
    name: str, size: int, phases: Iterable[Phase], *, is_estimate: bool = False, note: str = ""
) -> Component:
    """The same size in all its phases."""
    return Component(name=name, amounts=dict.fromkeys(phases, size), is_estimate=is_estimate, note=note)


def _size(dtype: DType) -> int:
    return 4 if dtype is DType.float32 else 2


def trained_parameters(cfg: Config, shape: ModelShape) -> int:
    """All, or those of the adapters."""
    if cfg.model.lora.rank:
        return shape.adapter_parameters(cfg.model.lora.rank, cfg.model.lora.targets)
    return shape.parameters


def engine_weights(cfg: Config, shape: ModelShape) -> int:
    """Whole on every rank, or split over those of an engine; a CPU packs a tied head a second time."""
    packed = shape.vocabulary * shape.hidden if shape.is_tied and cfg.device is Device.cpu else 0
    return math.ceil((shape.parameters + packed) / cfg.engine.tensor_parallel) * _size(cfg.model.dtype)


def kv_bytes_per_token(cfg: Config, shape: ModelShape) -> int:
    """A rank's keys and values of one token in all layers; ranks beyond the number of heads hold copies."""
    heads = math.ceil(shape.kv_heads / cfg.engine.tensor_parallel)
    return 2 * shape.layers * heads * shape.head_dim * _size(cfg.model.dtype)


def trainer_parameters(cfg: Config, total: int, world_size: int) -> int:
    """Whole below stage 3; split there."""
    share = math.ceil(total / world_size) if cfg.deepspeed.zero_stage == 3 else total
    return share * _size(cfg.model.dtype)


def gathered(cfg: Config, shape: ModelShape, total: int, world_size: int) -> int:
    """At stage 3: the largest tensor and what DeepSpeed prefetches, at most."""
    if cfg.deepspeed.zero_stage < 3 or world_size == 1:
        return 0
    largest = max(ZERO3_LIVE_ELEMENTS, shape.vocabulary * shape.hidden)
    return min(total, largest) * _size(cfg.model.dtype)


def optimizer_states(cfg: Config, trained: int, world_size: int) -> int:
    """AdamW's moments, and ZeRO's master weights beside weights of whatever format."""
    if cfg.deepspeed.zero_stage == 0:
        return 8 * trained
    return 12 * math.ceil(trained / world_size)


def gradients(cfg: Config, trained: int, world_size: int) -> int:
    """Accumulated gradients: this rank's share from stage 2 on."""
    share = math.ceil(trained / world_size) if cfg.deepspeed.zero_stage >= 2 else trained
    return share * _size(cfg.model.dtype)


def reduce_buffer(cfg: Config, trained: int) -> int:
    """ZeRO's bucket, allocated whole; on the CPU only what is used becomes resident."""
    if cfg.deepspeed.zero_stage == 0:
        return 0
    elements = REDUCE_BUCKET_ELEMENTS
    return (min(elements, trained) if cfg.device is Device.cpu else elements) * _size(cfg.model.dtype)


def step_gradients(cfg: Config, trained: int, world_size: int) -> int:
    """ZeRO's flat fp32 gradients of the optimizer step; at stage 3 one group of parameters at a time."""
    if cfg.deepspeed.zero_stage == 0:
        return 0
    share = math.ceil(trained / world_size)
    return 4 * (min(share, ZERO3_LIVE_ELEMENTS) if cfg.deepspeed.zero_stage == 3 else share)


def layer_activations(cfg: Config, shape: ModelShape) -> int:
    """Estimate for one layer and the largest micro-batch: ``batching.max_tokens``, or a longer trajectory."""
    b, tokens = _size(cfg.model.dtype), max(cfg.batching.max_tokens, cfg.episode.max_context_tokens)
    queries = shape.heads * shape.head_dim
    layer = tokens * (2 * shape.hidden * (4 + 2 * b) + 5 * queries * b + 4 * shape.intermediate * b)
    if cfg.batching.packing and cfg.model.attention is Attention.sdpa:
        layer += tokens * 2 * queries * b
    return layer


def activations(cfg: Config, shape: ModelShape) -> int:
    """Estimate of what the forward pass of the largest micro-batch keeps for the backward pass."""
    layer = layer_activations(cfg, shape)
    if not cfg.model.gradient_checkpointing:
        return shape.layers * layer
    tokens = max(cfg.batching.max_tokens, cfg.episode.max_context_tokens)
    return shape.layers * tokens * shape.hidden * _size(cfg.model.dtype) + layer


def head(cfg: Config, shape: ModelShape) -> tuple[int, int]:
    """Estimates of the head's forward and backward pass; with adapters its weight is not trained."""
    b, logits = _size(cfg.model.dtype), cfg.batching.logprob_chunk * shape.vocabulary
    weight = 0 if cfg.model.lora.rank else shape.vocabulary * shape.hidden
    lower = b if b < 4 else 0
    forward = logits * (2 * 4 + lower)
    backward = logits * ((2 if cfg.loss.entropy_coef else 1) * 4 + lower) + weight * (4 + lower)
    return forward, backward


def sync_bucket(cfg: Config, shape: ModelShape, total: int, world_size: int) -> int:
    """Estimate: what ZeRO-3 gathers at one time, and the copies that merging adapters into a weight makes."""
    b, size = _size(cfg.model.dtype), 0
    if cfg.deepspeed.zero_stage == 3 and world_size > 1:
        size = min(total, max(SYNC_BUCKET_ELEMENTS, shape.vocabulary * shape.hidden)) * b
    if cfg.model.lora.rank:
        largest = max(rows * columns for rows, columns in shape.linear_layers.values())
        size += largest * (
            4 if b == 4 else 4 + 4 + b
        )  # the sum in fp32; below, also its parts and the result
    return size


def engine_work(cfg: Config, shape: ModelShape) -> int:
    """Estimate of the engine's own activations and logits."""
    tokens = max(cfg.engine.max_num_batched_tokens, cfg.episode.max_context_tokens)
    widest = tokens * (3 * shape.intermediate + 2 * shape.hidden) * _size(cfg.model.dtype)
    return widest + 3 * 4 * cfg.engine.max_num_seqs * shape.vocabulary
