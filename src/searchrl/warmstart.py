"""Supervised warm start: teaches the form of the protocol from a few rule-made trajectories, then stops.

A small pretrained model never writes ``<search>`` by itself, so there would be nothing to reinforce.
Demonstrations come from *training* questions that carry ``metadata.gold_queries``; what they search for is
really searched, and the observations are what really came back. The result is a model folder, cached by a
hash of everything that it depends on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from searchrl.actor import Actor
from searchrl.answers import contains_answer
from searchrl.batching import balance, count_loss_tokens, pack
from searchrl.config import (
    Config,
    ConfigError,
    LoraConfig,
    OptimizerConfig,
    Schedule,
    WarmstartConfig,
)
from searchrl.console import Console
from searchrl.distributed import World, barrier, broadcast_object
from searchrl.policy import TokenOutputs
from searchrl.protocol import Protocol
from searchrl.tools import Tool
from searchrl.trajectory import Example, Finish, Outcome, Sample, ToolCall, Trajectory, Turn

RECIPE = 2
"""Raised when demonstrations are made otherwise, so that cached models are made anew."""


@dataclass(kw_only=True, slots=True, frozen=True)
class WarmstartInputs:
    """What a warm start works with."""

    model: Path | str
    tokenizer: Any
    protocol: Protocol
    tool: Tool
    examples: Sequence[Example]
    fingerprint: str
    """Of everything that is not in the configuration: weights, data, index."""


def warmstart(
    cfg: Config, inputs: WarmstartInputs, *, world: World, runner: asyncio.Runner, console: Console
) -> Path:
    """The folder of the warm-started model, made now unless it is cached. A collective.

    Raises:
        ConfigError: the training questions cannot supply the demonstrations.
    """
    key = json.dumps(
        [RECIPE, asdict(cfg.warmstart), asdict(cfg.episode), cfg.model.dtype, cfg.seed, inputs.fingerprint]
    )
    folder = Path(cfg.assets) / "warmstart" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if broadcast_object((folder / "config.json").exists()):  # one decision for all ranks
        console.say(f"warm start: cached in {folder}")
        return folder
    demonstrations = runner.run(_demonstrations(cfg.warmstart, inputs, random.Random(cfg.seed)))
    console.say(
        f"warm start: {len(demonstrations)} demonstrations, for example\n{_show(demonstrations, inputs)}"
    )
    if cfg.deepspeed.zero_stage == 3:
        console.warn(
            "warm start: DeepSpeed's ZeRO-3 keeps its memory until this process ends; if that is too much, "
            "make it with `searchrl warmstart` and the same settings first"
        )
    # A name of its own: another run may be making the same one at the same time.
    partial = folder.with_name(f".{folder.name}.{broadcast_object(os.getpid())}.partial")
    actor = _trained(cfg, inputs.model, demonstrations, world=world, console=console)
    actor.export(partial, inputs.tokenizer)
    actor.close()  # before the engine and the trained actor need the room
    if world.is_main:
        publish(partial, folder)
    barrier()
    return folder


def _trained(
    cfg: Config, model: Path | str, demonstrations: list[Sample], *, world: World, console: Console
) -> Actor:
    """An actor that has learnt the demonstrations, whose order is changed. A collective."""
    per_epoch = -(-len(demonstrations) // cfg.warmstart.batch_size)
    steps = per_epoch * cfg.warmstart.epochs
    actor = Actor(
        model,
        model=replace(cfg.model, lora=LoraConfig()),  # whole: the reference begins where this ends
        optimizer=OptimizerConfig(
            lr=cfg.warmstart.lr,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            warmup_steps=max(1, steps // 10),
            schedule=Schedule.linear,
        ),
        zero_stage=cfg.deepspeed.zero_stage,
        temperature=1.0,
        logprob_chunk=cfg.batching.logprob_chunk,
        total_steps=steps,
        seed=cfg.seed,
        world=world,
    )
    step = 0
    order = random.Random(cfg.seed)
    with console.progress("warm start steps", steps) as advance:
        for _ in range(cfg.warmstart.epochs):
            order.shuffle(demonstrations)
            for start in range(0, len(demonstrations), cfg.warmstart.batch_size):
                batch = demonstrations[start : start + cfg.warmstart.batch_size]
                mine = pack(balance(batch, world.size)[world.rank], cfg.batching.max_tokens)
                actor.update(mine, _negative_log_likelihood, denominator=count_loss_tokens(batch), step=step)
                step += 1
                advance(step)
    return actor


def publish(partial: Path, folder: Path) -> None:
    """Give a finished model folder its name; if another run was first, keep that one: the two are alike.

    Raises:
        OSError: it cannot be renamed, and no model stands there.
    """
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():
            raise
        shutil.rmtree(partial)


def _negative_log_likelihood(outputs: TokenOutputs) -> Tensor:
    return -outputs.logprobs.sum()


async def _demonstrations(
    config: WarmstartConfig, inputs: WarmstartInputs, rng: random.Random
) -> list[Sample]:
    """Demonstrations in a fixed order; questions whose search does not show the answer are passed over."""
    two_hop = round(config.demonstrations * config.two_hop_fraction)
    wanted = {1: config.demonstrations - two_hop, 2: two_hop}
    samples: list[Sample] = []
    for hops, count in wanted.items():
        candidates = [e for e in inputs.examples if e.hops == hops and len(_gold_queries(e)) == hops]
        rng.shuffle(candidates)
        made: list[Sample] = []
        for start in range(0, len(candidates), 64):
            if len(made) >= count:
                break
            chunk = candidates[start : start + 64]
            results = await asyncio.gather(*(_demonstrate(e, inputs, config.thoughts) for e in chunk))
            made += [
                Sample(trajectory=trajectory, advantage=1.0, id=f"demonstration/{example.id}")
                for example, trajectory in zip(chunk, results, strict=True)
                if trajectory is not None
            ]
        if len(made) < count:
            raise ConfigError(
                f"warmstart.demonstrations={config.demonstrations} needs {count} training questions with "
                f"{hops} hop(s), metadata.gold_queries and an answer among the documents, but there are "
                f"{len(made)}: lower it, change warmstart.two_hop_fraction, or set it to 0"
            )
        samples += made[:count]
    rng.shuffle(samples)
    return samples


def _gold_queries(example: Example) -> list[str]:
    queries = example.metadata.get("gold_queries", [])
    return [str(query) for query in queries] if isinstance(queries, list) else []


async def _demonstrate(example: Example, inputs: WarmstartInputs, thoughts: bool) -> Trajectory | None:
    """Search as ``gold_queries`` say, then answer; None if a search does not show what it is for."""
    queries = _gold_queries(example)
    bridge = str(example.metadata.get("bridge_answer", ""))
    turns: list[Turn] = []
    for number, query in enumerate(queries):
        thought = "I need to search." if number == 0 else f"It is {bridge}. I need to search again."
        turn = _turn(inputs, _think(thought, thoughts) + f"<search>{query}</search>")
        turn.call = ToolCall(query=query)
        turn.result = await inputs.tool(turn.call, example)
        sought = example.golden_answers if number == len(queries) - 1 else (bridge,)
        if not any(contains_answer(document.contents, sought) for document in turn.result.documents):
            return None
        said = inputs.protocol.observation(turn.result.documents)
        turn.observation_ids, turn.observation_text = said.token_ids, said.text
        turns.append(turn)
    gold = example.golden_answers[0]
    turns.append(_turn(inputs, _think("I found it.", thoughts) + f"<answer>{gold}</answer>"))
    return Trajectory(
        prompt_ids=inputs.protocol.prompt(example), turns=turns, outcome=Outcome.ANSWERED, answer=gold
    )


def _think(thought: str, thoughts: bool) -> str:
    return f"<think>{thought}</think>\n" if thoughts else ""


def _turn(inputs: WarmstartInputs, text: str) -> Turn:
    ids = [int(i) for i in inputs.tokenizer.encode(text, add_special_tokens=False)]
    return Turn(token_ids=ids, logprobs=[0.0] * len(ids), text=text, finish=Finish.STOP, policy_version=0)


def _show(samples: Sequence[Sample], inputs: WarmstartInputs) -> str:
    longest = max(samples, key=lambda sample: len(sample.trajectory.turns))
    return inputs.protocol.decode(longest.trajectory.token_ids)
