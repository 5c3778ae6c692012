"""Checks of a composed configuration that types cannot express; all problems are reported at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from searchrl.config import (
    Config,
    ConfigError,
    DType,
    IndexKind,
    RetrievalConfig,
    RetrievalKind,
    RewardKind,
)
from searchrl.retrieval.devices import DeviceError, gpu_numbers
from searchrl.retrieval.kinds import dense_index_problem
from searchrl.retrieval.wire import TOKEN_VARIABLE, is_token


def validate(cfg: Config, *, world_size: int = 1) -> None:
    """Raise ``ConfigError`` listing every problem, each with the value and the remedy.

    Args:
        cfg: converted by ``OmegaConf.to_object``.
        world_size: ranks of the run.
    """
    problems = [
        *_required(cfg),
        *_positive(cfg),
        *_ranges(cfg),
        *_sizes(cfg, world_size),
        *_retrieval(cfg),
    ]
    if problems:
        raise ConfigError("the configuration cannot run:\n" + "\n".join(f"  - {p}" for p in problems))


def _required(cfg: Config) -> Iterator[str]:
    given = {"model.path": cfg.model.path, "data.train": cfg.data.train, "data.eval": cfg.data.eval}
    for name, value in given.items():
        if not value:
            yield (
                f"{name} is not set; give it, or start from an experiment, for example +experiment=quickstart"
            )
    for name in ("data.train", "data.eval"):
        value = given[name]
        if value and not Path(value).is_file():
            yield f"{name}={value} does not exist; `searchrl data worldfacts` builds the quickstart's data"


def _positive(cfg: Config) -> Iterator[str]:
    at_least_one = {
        "steps": cfg.steps,
        "groups_per_step": cfg.groups_per_step,
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
        "saving.keep": cfg.saving.keep,
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
        "sync.probe_max_abs_diff": cfg.sync.probe_max_abs_diff,
        "warmstart.lr": cfg.warmstart.lr,
    }
    for name, number in above_zero.items():
        if not number > 0:
            yield f"{name}={number:g} must be above 0"
    at_least_zero = {
        "seed": cfg.seed,
        "optimizer.warmup_steps": cfg.optimizer.warmup_steps,
        "optimizer.weight_decay": cfg.optimizer.weight_decay,
        "episode.max_searches": cfg.episode.max_searches,
        "loss.kl_coef": cfg.loss.kl_coef,
        "eval.every": cfg.eval.every,
        "eval.questions": cfg.eval.questions,
        "eval.interim_questions": cfg.eval.interim_questions,
        "saving.every": cfg.saving.every,
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
    if not 0 <= cfg.loss.eps_low < 1 or cfg.loss.eps_high < 0:
        yield (
            f"loss.eps_low={cfg.loss.eps_low:g}, loss.eps_high={cfg.loss.eps_high:g}: the clip range needs "
            "0 <= eps_low < 1 and eps_high >= 0"
        )
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


def _sizes(cfg: Config, world_size: int) -> Iterator[str]:
    if cfg.group_size < 2:
        yield f"group_size={cfg.group_size} leaves nothing to compare within a group; use at least 2"
    if cfg.groups_per_step % world_size:
        yield (
            f"groups_per_step={cfg.groups_per_step} cannot be shared evenly by {world_size} ranks; "
            f"use a multiple of {world_size}"
        )
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


def _retrieval(cfg: Config) -> Iterator[str]:
    retrieval = cfg.retrieval
    if retrieval.shuffle_documents and retrieval.kind is not RetrievalKind.embedded:
        yield (
            f"retrieval.shuffle_documents=true shuffles the embedded corpus, which retrieval.kind="
            f"{retrieval.kind} does not have; choose retrieval=shuffled, or set it to false"
        )
    if retrieval.cache and retrieval.kind is RetrievalKind.none:
        yield f"retrieval.cache={retrieval.cache} has nothing to record with retrieval=none; leave it empty"
    match retrieval.kind:
        case RetrievalKind.embedded:
            yield from _embedded(retrieval)
        case RetrievalKind.http:
            if not retrieval.urls:
                yield "retrieval.urls is empty; name at least one server, for example [http://127.0.0.1:8000]"
            for url in retrieval.urls:
                if not url.startswith(("http://", "https://")):
                    yield f"retrieval.urls holds {url!r}, which is no http:// or https:// address"
            token = os.environ.get(TOKEN_VARIABLE)
            if token and not is_token(token):
                yield f"the environment variable {TOKEN_VARIABLE} must be printable ASCII without spaces"
        case RetrievalKind.google | RetrievalKind.brave | RetrievalKind.searxng | RetrievalKind.mcp:
            yield from _web(retrieval)
        case RetrievalKind.replay:
            if not retrieval.cache:
                yield "retrieval.cache is not set; name the recording that retrieval=replay answers from"
            elif not Path(retrieval.cache).is_file():
                yield (
                    f"retrieval.cache={retrieval.cache} does not exist; record one by running the same with "
                    "another retrieval and retrieval.cache=FILE"
                )
        case RetrievalKind.none:
            pass


def _embedded(retrieval: RetrievalConfig) -> Iterator[str]:
    if not retrieval.corpus:
        yield "retrieval.corpus is not set; name a corpus (JSONL), or choose retrieval=none or http"
    elif not Path(retrieval.corpus).is_file():
        yield (
            f"retrieval.corpus={retrieval.corpus} does not exist; `searchrl data worldfacts` builds "
            "the quickstart's"
        )
    families = ("minilm", "e5", "bge")
    if retrieval.index is not IndexKind.bm25 and retrieval.encoder_family not in families:
        yield (
            f"retrieval.encoder_family={retrieval.encoder_family} is unknown; choose one of "
            + ", ".join(families)
        )
    if retrieval.index is not IndexKind.bm25 and (problem := dense_index_problem(retrieval.dense_index)):
        yield f"retrieval.dense_index={retrieval.dense_index}: {problem}"
    if retrieval.index_path and not (Path(retrieval.index_path) / "manifest.json").is_file():
        yield (
            f"retrieval.index_path={retrieval.index_path} holds no index (no manifest.json); make one with "
            "`searchrl index build`, or leave it empty to have one built under assets"
        )
    try:
        gpu_numbers(retrieval.devices)
    except DeviceError as error:
        yield f"retrieval.devices: {error}"


_KEYS = {RetrievalKind.google: "SERPER_API_KEY", RetrievalKind.brave: "BRAVE_API_KEY"}


def _web(retrieval: RetrievalConfig) -> Iterator[str]:
    key = _KEYS.get(retrieval.kind)
    if key is not None and not os.environ.get(key):
        yield f"retrieval.kind={retrieval.kind} needs a key in the environment variable {key}"
    url = retrieval.web.url
    if key is None and not url.startswith(("http://", "https://")):
        example = "http://127.0.0.1:8080" + ("/mcp" if retrieval.kind is RetrievalKind.mcp else "")
        yield (
            f"retrieval.web.url={url!r} is no http:// or https:// address, which retrieval.kind="
            f"{retrieval.kind} needs; for example {example}"
        )
    if not retrieval.web.requests_per_second > 0:
        yield f"retrieval.web.requests_per_second={retrieval.web.requests_per_second:g} must be above 0"
    if retrieval.web.proxy and not retrieval.web.proxy.startswith(("http://", "https://")):
        yield f"retrieval.web.proxy={retrieval.web.proxy!r} is no http:// or https:// address"
    if retrieval.kind is RetrievalKind.mcp and not retrieval.web.tool:
        yield "retrieval.web.tool is not set; name the search tool of the MCP server"
    if retrieval.web.max_requests < 0:
        yield f"retrieval.web.max_requests={retrieval.web.max_requests} must not be negative"
