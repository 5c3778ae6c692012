"""One run of TRL's GRPOTrainer and a search tool, as like a run of searchrl as both allow.

``compare.py`` starts it, in a virtual environment that has TRL and sees searchrl's packages. Takes searchrl's
configuration: the same policy, questions in the same order, prompts, stop strings, limits of turns, texts of
observations, sampling and optimizer. The stream of tokens has the same form as well: a chat template and a
response template teach TRL to read ``<search>`` as a call of the tool and to append the observation to it.

Prints one JSON object an optimizer step: seconds in all and by phase, trajectories, tokens, searches.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from searchrl.answers import exact_match
from searchrl.compose import load_config
from searchrl.config import Config
from searchrl.data.readers import read_examples
from searchrl.data.sampler import Sampler
from searchrl.environment import matmul_gflops, prepare_environment
from searchrl.protocol import STOP_STRINGS, Protocol, Search, load_tokenizer, parse_action
from searchrl.retrieval.wire import parse_answer

# TRL finds out what stands between a call and the model's next word by rendering a dummy conversation up to
# the last end-of-message token; one behind the call makes it append the observation and nothing else.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'tool' -%}{{ message.content }}
{%- elif message.tool_calls -%}
<|im_start|>assistant
{% for call in message.tool_calls -%}
<search>{{ call.function.name }} {{ call.function.arguments | tojson }}</search><|im_end|>
{%- endfor -%}
{%- else -%}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}<|im_start|>assistant
{% endif -%}"""

RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    # What was already acted on is not parsed again: the model goes on behind the last observation.
    "start_anchor_pattern": r"<\|im_start\|>assistant\n|</information>\s*",
    "fields": {
        "tool_calls": {
            "open": "<search>",
            "close_pattern": r"</search>\s*",
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": "search", "arguments": {"query": "{content}"}},
            },
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


class Meter:
    """Seconds and counts of the step under way."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        self.values[name] = self.values.get(name, 0.0) + value

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose seconds are added under ``name``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(name, time.perf_counter() - start)

        return call

    def take(self) -> dict[str, float]:
        values, self.values = self.values, {}
        return values


def searcher(cfg: Config, protocol: Protocol) -> Callable[[str], str]:
    """Asks the search server and returns the observation that searchrl's protocol would append."""
    client = httpx.Client(timeout=cfg.retrieval.timeout_s, trust_env=False)
    url, top_k = cfg.retrieval.urls[0], cfg.episode.top_k

    def ask(query: str) -> str:
        body = {"queries": [query[: cfg.episode.max_query_chars]], "topk": top_k, "return_scores": True}
        response = client.post(f"{url}/retrieve", json=body)
        (documents,) = parse_answer(response.content, num_queries=1, top_k=top_k)
        return protocol.observation(documents).text

    return ask


def search_tool(ask: Callable[[str], str], meter: Meter) -> Callable[[str], str]:
    """``ask`` as TRL's ``tools`` want it."""
    ask = meter.timed("search", ask)

    def search(query: str) -> str:
        """Search for passages.

        Args:
            query: what to search for.

        Returns:
            The passages found.
        """
        meter.add("searches", 1.0)
        return str(ask(query))

    return search


def concurrent_rollout(cfg: Config, tokenizer: Any, ask: Callable[[str], str], meter: Meter) -> Any:
    """A ``rollout_func`` that asks for all searches of a turn at once; TRL's own loop asks one by one."""
    pool = ThreadPoolExecutor(max_workers=256)

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        prompt_ids = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        completions: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        mask: list[list[int]] = [[] for _ in prompts]
        playing = list(range(len(prompts)))
        for turn in range(cfg.episode.max_searches + 1):
            streams = [prompt_ids[i] + completions[i] for i in playing]
            _, ids, scores, _ = trainer.vllm_generation.generate(streams, None, num_generations=1)
            queries: dict[int, str] = {}
            for i, sampled, row in zip(playing, ids, scores, strict=True):
                completions[i] += sampled
                logprobs[i] += [score[0] for score in row]
                mask[i] += [1] * len(sampled)
                action = parse_action(tokenizer.decode(sampled), cfg.episode.max_query_chars)
                if isinstance(action, Search) and turn < cfg.episode.max_searches:
                    queries[i] = action.call.query
            meter.add("searches", float(len(queries)))
            asked = meter.timed("search", lambda texts: list(pool.map(ask, texts)))
            playing = []
            for i, text in zip(queries, asked(queries.values()), strict=True):
                appended = tokenizer.encode(text, add_special_tokens=False)
                if len(prompt_ids[i]) + len(completions[i]) + len(appended) < cfg.episode.max_context_tokens:
                    completions[i] += appended
                    logprobs[i] += [0.0] * len(appended)
                    mask[i] += [0] * len(appended)
                    playing.append(i)
            if not playing:
                break
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completions,
            "logprobs": logprobs,
            "env_mask": mask,
        }

    return rollout


def reward(completions: Sequence[Any], golden_answers: Sequence[list[str]], **_: Any) -> list[float]:
    """Exact match of the last message's answer."""
    rewards = []
    for messages, gold in zip(completions, golden_answers, strict=True):
        found = re.findall(r"<answer>(.*?)</answer>", str(messages[-1].get("content", "")), re.DOTALL)
        rewards.append(float(bool(found) and exact_match(found[-1].strip(), gold)))
    return rewards


def rows(cfg: Config) -> list[dict[str, Any]]:
    """Prompts and gold answers in the order in which a run of searchrl draws them."""
    examples = read_examples(Path(cfg.data.train))
    hops = cfg.data.train_hops
    kept = [example for example in examples if not hops or example.hops in hops]
    drawn = Sampler(kept, seed=cfg.seed).take(cfg.steps * cfg.groups_per_step)
    template = cfg.episode.prompt_template
    return [
        {
            "prompt": [{"role": "user", "content": template.replace("{question}", example.question.strip())}],
            "golden_answers": list(example.golden_answers),
        }
        for _, example in drawn
    ]


def arguments(cfg: Config, micro_batch: int, folder: str) -> Any:
    """TRL's settings for the same work: GRPO with token-level truncated importance sampling."""
    from trl import GRPOConfig

    batch = cfg.groups_per_step * cfg.group_size
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": str(cfg.model.dtype)},
        gradient_checkpointing=cfg.model.gradient_checkpointing,
        max_steps=cfg.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch // micro_batch,
        num_generations=cfg.group_size,
        max_completion_length=cfg.episode.max_context_tokens,
        temperature=cfg.sampling.temperature,
        shuffle_dataset=False,
        seed=cfg.seed,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=cfg.episode.max_context_tokens,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
        generation_kwargs={
            "max_tokens": cfg.episode.max_turn_tokens,
            "stop": list(STOP_STRINGS),
            "include_stop_str_in_output": True,
        },
        max_tool_calling_iterations=cfg.episode.max_searches,
        beta=0.0,
        learning_rate=cfg.optimizer.lr,
        adam_beta1=cfg.optimizer.betas[0],
        adam_beta2=cfg.optimizer.betas[1],
        weight_decay=cfg.optimizer.weight_decay,
        max_grad_norm=cfg.optimizer.max_grad_norm,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )


def same_engine(cfg: Config) -> None:
    """Give TRL's engine the settings of ours that TRL has no words for, some of which a CPU needs."""
    import trl.generation.vllm_generation as theirs

    theirs.LLM = partial(
        theirs.LLM,
        enforce_eager=True,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=int(cfg.engine.kv_cache_gib * 2**30),
        block_size=cfg.engine.block_size,
        use_tqdm_on_load=False,
        disable_log_stats=True,
    )


def train(cfg: Config, micro_batch: int, loop: str) -> None:
    """Train ``cfg.steps`` steps, with TRL's own loop of turns or the concurrent one, and print each."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    meter = Meter()
    tokenizer = load_tokenizer(cfg.checkpoint)
    protocol = Protocol(load_tokenizer(cfg.checkpoint), cfg.episode)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE

    ask = searcher(cfg, protocol)
    if loop == "tools":
        turns: dict[str, Any] = {"tools": [search_tool(ask, meter)]}
    else:
        turns = {"rollout_func": concurrent_rollout(cfg, tokenizer, ask, meter)}

    class Steps(TrainerCallback):  # type: ignore[misc, unused-ignore]  # a class of a library without types
        """Prints a step as it ends."""

        started = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            print(json.dumps({"step_s": now - self.started, **meter.take()}), flush=True)
            self.started = time.perf_counter()

    same_engine(cfg)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=cfg.checkpoint,
            reward_funcs=reward,
            args=arguments(cfg, micro_batch, folder),
            train_dataset=Dataset.from_list(rows(cfg)),
            processing_class=tokenizer,
            callbacks=[Steps()],
            **turns,
        )
        generate = meter.timed("rollout", trainer._generate)

        def counted(prompts: list[Any]) -> Any:
            made = generate(prompts)
            prompt_ids, completion_ids, tool_mask = made[:3]
            meter.add("trajectories", float(len(prompt_ids)))
            meter.add("tokens", float(sum(map(len, prompt_ids)) + sum(map(len, completion_ids))))
            meter.add("sampled", float(sum(map(sum, tool_mask))))
            return made

        trainer._generate = counted
        trainer._generate_and_score_completions = meter.timed(
            "rollout_and_logprob", trainer._generate_and_score_completions
        )
        engine = trainer.vllm_generation
        engine.generate = meter.timed("generate", engine.generate)
        engine.sync_weights = meter.timed("sync", engine.sync_weights)
        trainer.train()


def main() -> None:
    """Train with searchrl's overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--micro-batch", type=int, default=16, help="trajectories of one forward pass")
    parser.add_argument("--loop", choices=["tools", "concurrent"], default="tools")
    parser.add_argument("overrides", nargs="*", help="searchrl's, with checkpoint and retrieval.urls")
    args = parser.parse_args()
    cfg, _ = load_config(args.overrides)
    prepare_environment("cpu")
    print(json.dumps({"matmul_gflops": matmul_gflops()}), flush=True)
    train(cfg, args.micro_batch, args.loop)


if __name__ == "__main__":
    main()
