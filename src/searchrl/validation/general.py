"""Checks of models, episodes, sizes and schedules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from searchrl.config import COMPARED_BY_CONTENT, Config, DType, RewardKind, WatchConfig, settings_to_keep
from searchrl.errors import did_you_mean
from searchrl.model_shape import ModelShape, find_shape
from searchrl.watch import rules


def general_problems(cfg: Config, world_size: int, local_world_size: int, training: bool) -> Iterator[str]:
    """Every problem of what is neither the algorithm's nor retrieval's, a sentence each."""
    yield from _required(cfg, training)
    yield from _positive(cfg)
    yield from _ranges(cfg)
    yield from _engines(cfg, world_size, local_world_size)
    if training:
        yield from _groups(cfg, world_size)
    yield from _sizes(cfg)
    yield from _watch(cfg)
    yield from _resuming(cfg)
    yield from _stall(cfg)


def _required(cfg: Config, training: bool) -> Iterator[str]:
    given = {"model.path": cfg.model.path, "data.train": cfg.data.train, "data.eval": cfg.data.eval}
    given |= {"name": cfg.name, "run_dir": cfg.run_dir}
    if not training and cfg.checkpoint:
        del given["model.path"]
    if not training and not cfg.warm_starts:
        del given["data.train"]
    for name, value in given.items():
        if not value.strip():
            yield (
                f"{name} is not set; give it, or start from an experiment, for example +experiment=quickstart"
            )
    for name, value in given.items():
        if name.startswith("data.") and value and not Path(value).is_file():
            yield (
                f"{name}={value} does not exist; `searchrl data worldfacts` builds the quickstart's data, "
                "`searchrl data prepare` the published sets"
            )


def _positive(cfg: Config) -> Iterator[str]:
    at_least_one = {
        "steps": cfg.steps,
        "groups_per_step": cfg.groups_per_step,
        "engine.tensor_parallel": cfg.engine.tensor_parallel,
        "engine.max_num_seqs": cfg.engine.max_num_seqs,
        "engine.block_size": cfg.engine.block_size,
        "engine.max_num_batched_tokens": cfg.engine.max_num_batched_tokens,
        "episode.max_turn_tokens": cfg.episode.max_turn_tokens,
        "episode.max_query_chars": cfg.episode.max_query_chars,
        "episode.max_consecutive_invalid": cfg.episode.max_consecutive_invalid,
        "episode.top_k": cfg.episode.top_k,
        "retrieval.max_concurrency": cfg.retrieval.max_concurrency,
        "batching.max_tokens": cfg.batching.max_tokens,
        "batching.logprob_chunk": cfg.batching.logprob_chunk,
        "sync.probe_sequences": cfg.sync.probe_sequences,
        "sync.probe_tokens": cfg.sync.probe_tokens,
        "eval.samples": cfg.eval.samples,
        "saving.keep": cfg.saving.keep,
        "watch.window": cfg.watch.window,
        "warmstart.epochs": cfg.warmstart.epochs,
        "warmstart.batch_size": cfg.warmstart.batch_size,
    }
    for name, value in at_least_one.items():
        if value < 1:
            yield f"{name}={value} must be at least 1"
    above_zero = {
        "optimizer.lr": cfg.optimizer.lr,
        "optimizer.max_grad_norm": cfg.optimizer.max_grad_norm,
        "engine.kv_cache_gib": cfg.engine.kv_cache_gib,
        "sampling.temperature": cfg.sampling.temperature,
        "retrieval.timeout_s": cfg.retrieval.timeout_s,
        "retrieval.deadline_s": cfg.retrieval.deadline_s,
        "episode.deadline_s": cfg.episode.deadline_s,
        "eval.temperature": cfg.eval.temperature,
        "sync.probe_max_abs_diff": cfg.sync.probe_max_abs_diff,
        "warmstart.lr": cfg.warmstart.lr,
        "watch.likelihood_fall": cfg.watch.likelihood_fall,
    }
    for name, number in above_zero.items():
        if not number > 0:
            yield f"{name}={number:g} must be above 0"
    at_least_zero = {
        "seed": cfg.seed,
        "processes": cfg.processes,
        "device_memory_gib": cfg.device_memory_gib,
        "optimizer.warmup_steps": cfg.optimizer.warmup_steps,
        "optimizer.weight_decay": cfg.optimizer.weight_decay,
        "episode.max_searches": cfg.episode.max_searches,
        "eval.every": cfg.eval.every,
        "eval.questions": cfg.eval.questions,
        "eval.interim_questions": cfg.eval.interim_questions,
        "saving.every": cfg.saving.every,
        "retrieval.patience_s": cfg.retrieval.patience_s,
        "warmstart.demonstrations": cfg.warmstart.demonstrations,
    }
    for name, number in at_least_zero.items():
        if number < 0:
            yield f"{name}={number:g} must not be negative"


def _ranges(cfg: Config) -> Iterator[str]:
    if cfg.sampling.top_p != 1.0:
        yield (
            f"sampling.top_p={cfg.sampling.top_p:g} truncates the distribution that rollouts sample from, "
            "but the loss does not renormalise; set it to 1"
        )
    if cfg.sampling.top_k != 0:
        yield (
            f"sampling.top_k={cfg.sampling.top_k} truncates the distribution that rollouts sample from, but "
            "the loss does not renormalise; set it to 0 (off)"
        )
    if cfg.deepspeed.zero_stage not in (0, 1, 2, 3):
        yield f"deepspeed.zero_stage={cfg.deepspeed.zero_stage} is no ZeRO stage; choose 0, 1, 2 or 3"
    if cfg.deepspeed.zero_stage == 0 and cfg.model.dtype is DType.bfloat16:
        yield (
            "deepspeed.zero_stage=0 with model.dtype=bfloat16 would train without fp32 master weights; "
            "choose stage 1, 2 or 3, or model.dtype=float32"
        )
    betas = list(cfg.optimizer.betas)  # OmegaConf checks the types, not the number
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optimizer.betas={betas} must be two numbers, each at least 0 and below 1"
    if "{question}" not in cfg.episode.prompt_template:
        yield "episode.prompt_template does not contain {question}; the policy would never see the question"
    if not 0 <= cfg.warmstart.two_hop_fraction <= 1:
        yield f"warmstart.two_hop_fraction={cfg.warmstart.two_hop_fraction:g} must lie between 0 and 1"
    acts_only = cfg.warmstart.demonstrations > 0 and not cfg.warmstart.thoughts
    if acts_only and cfg.reward.kind is RewardKind.em_plus_format:
        yield (
            "reward.kind=em_plus_format rewards thinking before acting, which demonstrations with "
            "warmstart.thoughts=false never show; choose warmstart.thoughts=true, or reward=em"
        )
    if not 0 <= cfg.retrieval.max_failed_fraction <= 1:
        yield f"retrieval.max_failed_fraction={cfg.retrieval.max_failed_fraction:g} must lie between 0 and 1"


def _engines(cfg: Config, world_size: int, local_world_size: int) -> Iterator[str]:
    size = cfg.engine.tensor_parallel
    if size <= 1:
        return
    for ranks, where in ((world_size, "run"), (local_world_size, "node")):
        if ranks % size:
            yield (
                f"engine.tensor_parallel={size} does not divide the number of ranks of the {where}, {ranks}; "
                f"start a multiple of {size} on every node, or lower it"
            )
            break
    model = cfg.checkpoint or cfg.model.path
    shape = find_shape(model)
    if shape is not None:
        possible = [n for n in range(1, shape.heads + 1) if _shares_heads(shape, n)]
        if size not in possible:
            yield (
                f"engine.tensor_parallel={size} cannot share the {shape.heads} attention heads and "
                f"{shape.kv_heads} key-value heads of {model}; choose among {', '.join(map(str, possible))}"
            )


def _shares_heads(shape: ModelShape, size: int) -> bool:
    """True if every rank can have as many heads; several may have copies of one key-value head."""
    return shape.heads % size == 0 and (shape.kv_heads % size == 0 or size % shape.kv_heads == 0)


def _groups(cfg: Config, world_size: int) -> Iterator[str]:
    if cfg.group_size < 2:
        yield f"group_size={cfg.group_size} leaves nothing to compare within a group; use at least 2"
    engines = max(1, world_size // max(1, cfg.engine.tensor_parallel))
    if cfg.groups_per_step % engines:
        yield (
            f"groups_per_step={cfg.groups_per_step} cannot be shared evenly by {engines} engines; "
            f"use a multiple of {engines}"
        )


def _sizes(cfg: Config) -> Iterator[str]:
    episode = cfg.episode
    longest = (episode.max_searches + 1) * episode.max_turn_tokens
    longest += episode.max_searches * episode.max_observation_tokens
    if longest >= episode.max_context_tokens:
        yield (
            f"an episode may need {longest} tokens ({episode.max_searches + 1} turns of "
            f"{episode.max_turn_tokens}, {episode.max_searches} observations of "
            f"{episode.max_observation_tokens}) besides its prompt, but episode.max_context_tokens="
            f"{episode.max_context_tokens}; raise it, or lower the others"
        )
    if episode.max_query_chars > 2048:
        yield (
            f"episode.max_query_chars={episode.max_query_chars} is more than search servers accept; use at "
            "most 2048"
        )
    if episode.max_observation_tokens < 32:
        yield (
            f"episode.max_observation_tokens={episode.max_observation_tokens} leaves no room for documents "
            "between the tags; use at least 32"
        )
    if cfg.optimizer.warmup_steps >= cfg.steps:
        yield (
            f"optimizer.warmup_steps={cfg.optimizer.warmup_steps} never ends within steps={cfg.steps}; "
            "lower it"
        )


def _watch(cfg: Config) -> Iterator[str]:
    if not 0 <= cfg.watch.min_ess_ratio <= 1:
        yield f"watch.min_ess_ratio={cfg.watch.min_ess_ratio:g} must lie between 0 and 1"
    known = [rule.name for rule in rules(WatchConfig())]
    for name in cfg.watch.ignore:
        if name not in known:
            yield f"watch.ignore={name} is no rule; choose among {', '.join(known)}"


def _resuming(cfg: Config) -> Iterator[str]:
    if cfg.resume not in (False, True, "auto"):
        yield f"resume={cfg.resume} says nothing; choose false, true (there must be a checkpoint) or auto"
    known = {*settings_to_keep(cfg), *COMPARED_BY_CONTENT}
    for name in cfg.resume_changes:
        if name not in known:
            hint = did_you_mean(name, known) or "; it may change anyway, or does not exist"
            yield f"resume_changes={name} is nothing that a resumed run must keep{hint}"
    every, evaluated = cfg.saving.every, cfg.eval.every
    if cfg.saving.keep_best and (every < 1 or evaluated < 1 or every % evaluated):
        yield (
            f"saving.keep_best needs an evaluation with every checkpoint, but saving.every={every} is no "
            f"multiple of eval.every={evaluated}; set both, for example to 50 and 25"
        )


def _stall(cfg: Config) -> Iterator[str]:
    retrieval, episode = cfg.retrieval, cfg.episode
    silent = episode.deadline_s + retrieval.patience_s + retrieval.deadline_s
    if not cfg.stall_timeout_s > silent:
        yield (
            f"stall_timeout_s={cfg.stall_timeout_s:g} would take a rollout for hanging that only waits: "
            f"it may be silent for episode.deadline_s={episode.deadline_s:g} + retrieval.patience_s="
            f"{retrieval.patience_s:g} + retrieval.deadline_s={retrieval.deadline_s:g}; raise it above "
            f"{silent:g}, or lower these"
        )
