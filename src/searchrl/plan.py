"""What a run needs before anything loads: memory of each rank by component, tokens and steps.

Exact, given the model's shape: weights, optimizer, key-value cache. With Ψ parameters of b bytes, of which
Ψ_t are trained, N ranks, ZeRO stage s:

- AdamW keeps 8 bytes a trained parameter in fp32, and where ZeRO works (s ≥ 1) a master copy of 4 more; they
  are split over N. Weights are bΨ (bΨ/N at stage 3), gradients bΨ_t (bΨ_t/N from stage 2 on). In bf16 that
  is the 16 bytes a parameter of the ZeRO paper (arXiv 1910.02054, section 3.1).
- A token's keys and values: 2 · layers · kv_heads · head_dim · b.
- An engine over t ranks (tensor_parallel) splits weights and heads over them; the cache is given per rank.

Estimates, marked as such where they are printed:

- What a layer keeps of a token for its backward pass, after arXiv 2205.05198 (section 4.1), but for this
  architecture: two norms, which compute in fp32, 2h(4 + 2b); queries, repeated keys and values, and the
  attention's result twice, 5ab; the gated MLP, 4ib (h hidden, a heads · head_dim, i intermediate). For a
  packed row of T tokens each layer also keeps its mask as numbers, T²b. With gradient checkpointing a layer
  keeps its input, hb a token, and one layer at a time the rest.
- The head in chunks of C positions: two fp32 buffers [C, V] in the forward pass; in the backward pass one
  (two with an entropy bonus) and, where the head is trained, the fp32 accumulator [V, h] of its gradient;
  below fp32 also a buffer and the result in b bytes (``algorithm.logprobs``, measured by
  benchmarks/update/head.py).
- The engine at work: its widest activations for one step's tokens, and three fp32 copies of the logits that
  it samples from. A packed copy of a tied head, which CPUs keep beside the embedding, counts as weights.

Everything lives together: no part sleeps or is offloaded. Peak = what is resident + the larger of the
update's and the rollout's own needs. Not counted: Python and its libraries, CUDA's context and graphs, what
allocators hold in reserve, the warm start (over before the engine starts), the retriever's process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from searchrl.config import Attention, Config, Device, DType
from searchrl.data.readers import first_of_each_source, read_examples
from searchrl.model_shape import ModelShape, find_shape
from searchrl.trajectory import Example

GIB = 2**30
REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default ``reduce_bucket_size``: where ZeRO collects gradients before it reduces them."""
ZERO3_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default ``stage3_max_live_parameters``: gathered at one time at most."""


@dataclass(kw_only=True, slots=True, frozen=True)
class MemoryPlan:
    """Bytes of one rank. See the module's docstring for the formulas."""

    engine_weights: int
    kv_cache: int
    parameters: int
    """The trainer's, frozen ones included; at stage 3 with what is gathered for use."""
    optimizer: int
    """fp32 master weights and both moments."""
    reference: int
    gradients: int
    """Accumulated over micro-batches."""
    reduce_buffer: int
    """ZeRO's bucket."""
    activations: int
    head: int
    step_gradients: int
    """The optimizer step's fp32 copy, when activations are gone."""
    engine_work: int
    kv_tokens: int
    """Tokens (no bytes) that the cache holds."""

    @property
    def resident(self) -> int:
        """What lives as long as the run."""
        return self.engine_weights + self.kv_cache + self.parameters + self.optimizer + self.reference

    @property
    def update(self) -> int:
        """What an update needs above that."""
        passes = self.reduce_buffer + self.activations + self.head
        return self.gradients + max(passes, self.step_gradients)

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.resident + max(self.update, self.engine_work)


@dataclass(kw_only=True, slots=True, frozen=True)
class TokenPlan:
    """Trajectories, tokens and steps of a run; "most" means that every episode goes to its limits."""

    trajectories_per_step: int
    longest_episode: int
    """Tokens besides the prompt."""
    most_tokens_per_step: int
    """Over all ranks, each trajectory as long as the context."""
    most_microbatches: int
    """Of one rank and step, no prefix shared."""
    optimizer_steps_per_rollout: int
    optimizer_steps: int
    questions_drawn: int
    """At least: dynamic sampling and over-sampling draw more."""
    train_questions: int | None
    """In ``data.train``; None: the file is not there."""
    eval_questions: int | None
    """Of the evaluation after training; None: the file is not there."""


def plan_memory(cfg: Config, shape: ModelShape, *, world_size: int) -> MemoryPlan:
    """Memory of one of ``world_size`` ranks."""
    trained = shape.parameters
    if cfg.model.lora.rank:
        trained = shape.adapter_parameters(cfg.model.lora.rank, cfg.model.lora.targets)
    frozen = shape.parameters if cfg.model.lora.rank else 0
    has_reference = cfg.loss.kl_coef > 0 and not cfg.model.lora.rank
    kv_cache = int(cfg.engine.kv_cache_gib * GIB)
    shared = min(cfg.engine.tensor_parallel, shape.kv_heads)  # beyond that heads are copied
    block = cfg.engine.block_size * kv_bytes_per_token(shape, cfg.model.dtype) // shared
    return MemoryPlan(
        engine_weights=engine_weights(cfg, shape),
        kv_cache=kv_cache,
        parameters=trainer_parameters(cfg, shape, trained + frozen, world_size),
        optimizer=optimizer_states(cfg, trained, world_size),
        reference=shape.parameters * _size(cfg.model.dtype) if has_reference else 0,
        gradients=gradients(cfg, trained, world_size),
        reduce_buffer=reduce_buffer(cfg, trained),
        activations=activations(cfg, shape),
        head=head(cfg, shape),
        step_gradients=step_gradients(cfg, trained, world_size),
        engine_work=engine_work(cfg, shape),
        kv_tokens=kv_cache // block * cfg.engine.block_size,
    )


def _size(dtype: DType) -> int:
    return 4 if dtype is DType.float32 else 2


def engine_weights(cfg: Config, shape: ModelShape) -> int:
    """Whole on every rank, or split over those of an engine; a CPU packs a tied head a second time."""
    packed = shape.vocabulary * shape.hidden if shape.is_tied and cfg.device is Device.cpu else 0
    return math.ceil((shape.parameters + packed) / cfg.engine.tensor_parallel) * _size(cfg.model.dtype)


def kv_bytes_per_token(shape: ModelShape, dtype: DType) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * _size(dtype)


def trainer_parameters(cfg: Config, shape: ModelShape, total: int, world_size: int) -> int:
    """Whole below stage 3; split there, with the largest tensor and what DeepSpeed prefetches gathered."""
    if cfg.deepspeed.zero_stage < 3 or world_size == 1:
        return total * _size(cfg.model.dtype)
    gathered = min(total, max(ZERO3_LIVE_ELEMENTS, shape.vocabulary * shape.hidden))
    return (math.ceil(total / world_size) + gathered) * _size(cfg.model.dtype)


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


def activations(cfg: Config, shape: ModelShape) -> int:
    """Estimate for the largest micro-batch: ``batching.max_tokens``, or one trajectory that is longer."""
    b, tokens = _size(cfg.model.dtype), max(cfg.batching.max_tokens, cfg.episode.max_context_tokens)
    queries = shape.heads * shape.head_dim
    per_token = 2 * shape.hidden * (4 + 2 * b) + 5 * queries * b + 4 * shape.intermediate * b
    layer = tokens * per_token
    if cfg.batching.packing and cfg.model.attention is Attention.sdpa:
        layer += cfg.batching.max_tokens**2 * b
    if cfg.model.gradient_checkpointing:
        return shape.layers * tokens * shape.hidden * b + layer
    return shape.layers * layer


def head(cfg: Config, shape: ModelShape) -> int:
    """Estimate of the larger of the head's two passes; with adapters its weight is not trained."""
    b, logits = _size(cfg.model.dtype), cfg.batching.logprob_chunk * shape.vocabulary
    weight = 0 if cfg.model.lora.rank else shape.vocabulary * shape.hidden
    lower = b if b < 4 else 0
    forward = logits * (2 * 4 + lower)
    backward = logits * ((2 if cfg.loss.entropy_coef else 1) * 4 + lower) + weight * (4 + lower)
    return max(forward, backward)


def engine_work(cfg: Config, shape: ModelShape) -> int:
    """Estimate of the engine's own activations and logits."""
    tokens = max(cfg.engine.max_num_batched_tokens, cfg.episode.max_context_tokens)
    widest = tokens * (3 * shape.intermediate + 2 * shape.hidden) * _size(cfg.model.dtype)
    return widest + 3 * 4 * cfg.engine.max_num_seqs * shape.vocabulary


def plan_tokens(cfg: Config, *, world_size: int, read_data: bool = True) -> TokenPlan:
    """Tokens and steps; counts the questions in the data files that are there.

    Raises:
        DataError: a data file is malformed.
    """
    episode, trajectories = cfg.episode, cfg.groups_per_step * cfg.group_size
    longest = (episode.max_searches + 1) * episode.max_turn_tokens
    longest += episode.max_searches * episode.max_observation_tokens
    rows = max(1, cfg.batching.max_tokens // episode.max_context_tokens)
    per_rollout = cfg.update.epochs * cfg.update.minibatches
    share = math.ceil(trajectories / world_size / cfg.update.minibatches)
    train, held_out = (_questions(cfg.data.train), _questions(cfg.data.eval)) if read_data else (None, None)
    hops = cfg.data.train_hops
    evaluated = None if held_out is None else first_of_each_source(held_out, cfg.eval.questions)
    return TokenPlan(
        trajectories_per_step=trajectories,
        longest_episode=longest,
        most_tokens_per_step=trajectories * episode.max_context_tokens,
        most_microbatches=math.ceil(share / rows) * per_rollout,
        optimizer_steps_per_rollout=per_rollout,
        optimizer_steps=cfg.steps * per_rollout,
        questions_drawn=cfg.steps * cfg.groups_per_step,
        train_questions=None if train is None else sum(not hops or e.hops in hops for e in train),
        eval_questions=None if evaluated is None else len(evaluated),
    )


def _questions(path: str) -> list[Example] | None:
    """The questions of a data file, if it is there."""
    return read_examples(Path(path)) if Path(path).is_file() else None


def describe(cfg: Config, *, world_size: int) -> str:
    """The plan as `searchrl validate` prints it, several lines.

    Raises:
        DataError, ModelError: a data file or a model's configuration is malformed.
    """
    model = cfg.checkpoint or cfg.model.path
    shape = find_shape(model)
    lines = [*_token_lines(cfg, plan_tokens(cfg, world_size=world_size)), ""]
    if shape is None:
        lines.append(f"memory: unknown until {model} is on this machine (its shape is)")
        return "\n".join(lines)
    plan = plan_memory(cfg, shape, world_size=world_size)
    lines.append(
        f"memory of each rank of {world_size}: {model}, {shape.parameters:,} parameters, {cfg.model.dtype}, "
        f"ZeRO {cfg.deepspeed.zero_stage} (GiB, ~ marks estimates)"
    )
    lines += [f"  {name:<34}{amount / GIB:8.2f}  {note}".rstrip() for name, amount, note in _rows(cfg, plan)]
    return "\n".join(lines)


def summary(cfg: Config, *, world_size: int) -> str:
    """The plan in one line, without reading data."""
    tokens = plan_tokens(cfg, world_size=world_size, read_data=False)
    shape = find_shape(cfg.checkpoint or cfg.model.path)
    memory = "memory unknown until the model is here"
    if shape is not None:
        plan = plan_memory(cfg, shape, world_size=world_size)
        memory = (
            f"about {plan.peak / GIB:.1f} GiB a rank ({plan.resident / GIB:.1f} resident, update "
            f"{plan.update / GIB:.1f}, rollout {plan.engine_work / GIB:.1f})"
        )
    return (
        f"plan: {memory}; {tokens.trajectories_per_step} trajectories a step, {tokens.optimizer_steps:,} "
        "optimizer steps"
    )


def _token_lines(cfg: Config, plan: TokenPlan) -> Iterator[str]:
    context = cfg.episode.max_context_tokens
    yield "tokens and steps"
    yield (
        f"  longest episode {plan.longest_episode:,} tokens, which leaves {context - plan.longest_episode:,} "
        f"of {context:,} to the prompt"
    )
    yield (
        f"  at most {plan.most_tokens_per_step:,} tokens a step; {plan.most_microbatches:,} micro-batches a "
        f"rank of {cfg.batching.max_tokens:,} tokens"
    )
    yield (
        f"  {plan.optimizer_steps:,} optimizer steps, {plan.optimizer_steps_per_rollout} on each rollout; "
        f"warm-up over {cfg.optimizer.warmup_steps:,} of {cfg.steps:,} rollouts"
    )
    drawn = f"  {plan.questions_drawn:,} questions drawn"
    if plan.train_questions:
        drawn += f" of {plan.train_questions:,}, {plan.questions_drawn / plan.train_questions:.2f} epochs"
    yield drawn + (f"; {plan.eval_questions:,} in the evaluation" if plan.eval_questions else "")


def _rows(cfg: Config, plan: MemoryPlan) -> Iterator[tuple[str, int, str]]:
    sequences = plan.kv_tokens // cfg.episode.max_context_tokens
    kv_note = f"{plan.kv_tokens:,} tokens, {sequences:,} full-length sequences"
    yield "engine: weights", plan.engine_weights, ""
    yield "engine: key-value cache", plan.kv_cache, kv_note
    yield "trainer: parameters", plan.parameters, ""
    yield (
        "trainer: optimizer",
        plan.optimizer,
        "fp32 master weights and moments" if cfg.deepspeed.zero_stage else "moments",
    )
    if plan.reference:
        yield "reference model", plan.reference, "loss.kl_coef=0 loads none"
    yield "resident", plan.resident, ""
    yield "update: gradients", plan.gradients, ""
    if plan.reduce_buffer:
        yield "update: ZeRO's bucket", plan.reduce_buffer, ""
    note = "" if cfg.model.gradient_checkpointing else "model.gradient_checkpointing=true keeps far less"
    yield "update: ~ activations", plan.activations, note
    yield "update: ~ head", plan.head, f"{cfg.batching.logprob_chunk:,} positions at a time"
    if plan.step_gradients:
        yield "update: fp32 gradients of the step", plan.step_gradients, "after activations, bucket and head"
    yield "rollout: ~ engine at work", plan.engine_work, ""
    yield "peak", plan.peak, "resident + the larger of update and rollout"
