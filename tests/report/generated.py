"""Runs that nobody trained: trajectories of random words, as many as asked for, and metrics."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONSONANTS, VOWELS = "bcdfghlmnprstvw", "aeiou"
OUTCOMES = ("answered", "answered", "answered", "answered", "no_answer", "token_limit", "tool_failed")
Encode = Callable[[str], list[int]]


def byte_level(words: Sequence[str]) -> Tokenizer:
    """A tokenizer of every byte, and of ``words`` as whole tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(words))
    return tokenizer


def syllables() -> Tokenizer:
    """A tokenizer that cuts the words of generated runs into syllables."""
    return byte_level([consonant + vowel for consonant in CONSONANTS for vowel in VOWELS])


def by_word(text: str) -> list[int]:
    """Ids for who needs none in particular: as many as words."""
    return [len(word) for word in text.split()]


def make_run(
    folder: Path,
    *,
    steps: int,
    groups: int,
    size: int = 8,
    length: int = 20,
    encode: Encode = by_word,
    seed: int = 0,
) -> Path:
    """Write a run directory. What is sampled repeats after a few hundred trajectories.

    Args:
        folder: its path.
        steps: of training.
        groups: of a step.
        size: trajectories of a group.
        length: words of a thought; documents have a few more.
        encode: makes token ids of sampled text.
        seed: of the words.
    """
    rng = random.Random(seed)
    words = [
        "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 4)))
        for _ in range(5000)
    ]
    bodies = [body(words, length, encode, rng) for _ in range(min(400, steps * groups * size))]
    (folder / "trajectories").mkdir(parents=True, exist_ok=True)
    (folder / "trainer_logprobs").mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(f"name: {folder.name}\nsteps: {steps}\ngroup_size: {size}\n")
    with (folder / "metrics.jsonl").open("w") as metrics:
        for step in range(1, steps + 1):
            metrics.write(json.dumps(metrics_of(step, steps, rng)) + "\n")
    for step in range(1, steps + 1):
        name = f"step-{step:06d}.rank0.jsonl"
        with (
            (folder / "trajectories" / name).open("w", encoding="utf-8") as file,
            (folder / "trainer_logprobs" / name).open("w", encoding="utf-8") as logprobs,
        ):
            for number in range((step - 1) * groups, step * groups):
                head = group_head(number, words, encode, rng)
                for member in range(size):
                    rest, trainer = rng.choice(bodies)
                    file.write(f'{{"id": "{number}/{member}", {head}, {rest}}}\n')
                    logprobs.write(f'{{"id": "{number}/{member}", "logprobs": {trainer}}}\n')
    return folder


def group_head(number: int, words: list[str], encode: Encode, rng: random.Random) -> str:
    """What the lines of a group share, as JSON without its braces."""
    question = f"Which {' '.join(rng.choices(words, k=9))}?"
    head = {
        "question_id": f"generated-{number}",
        "question": question,
        "golden_answers": [" ".join(rng.choices(words, k=2))],
        "hops": 1 + number % 2,
        "prompt_ids": encode(question),
    }
    return json.dumps(head)[1:-1]


def metrics_of(step: int, steps: int, rng: random.Random) -> dict[str, float]:
    """A line of ``metrics.jsonl``."""
    done = step / steps
    return {
        "step": step,
        "reward/exact_match": 0.2 + 0.4 * done + rng.gauss(0, 0.03),
        "reward/mean": 0.3 + 0.5 * done + rng.gauss(0, 0.03),
        "reward/answer": 0.2 + 0.4 * done,
        "reward/format": 0.1 + 0.1 * done,
        "search_r1/search_calls_per_sample": 1 + done,
        "tis/ess_ratio": 0.99 - 0.02 * rng.random(),
        "tis/k3": 10 ** (-4 + done),
        "loss/entropy": 0.6 * math.exp(-2 * done),
        "rollout/outcome/answered": 0.8 + 0.1 * done,
        "rollout/outcome/token_limit": 0.2 - 0.1 * done,
        "rollout/sampled_tokens": 80 - 20 * done,
        "rollout/response_tokens": 300 + 100 * done,
        "time/rollout": 30 + rng.random(),
        "time/update": 40 + rng.random(),
        "time/sync": 2,
        "time/step": 73,
        "memory/rollout_peak_gib": 2.5,
        "memory/update_peak_gib": 3.5 + done,
        "update/grad_norm": 1 + rng.random(),
        "update/lr": 3e-5,
    }


def body(words: list[str], length: int, encode: Encode, rng: random.Random) -> tuple[str, str]:
    """The rest of a line, two searches and an answer, and what the trainer says: nearly the same."""

    def say(count: int) -> str:
        return " ".join(rng.choices(words, k=count))

    outcome = rng.choice(OUTCOMES)
    answer = say(2) if outcome == "answered" else None
    void, right = outcome == "tool_failed", outcome == "answered" and rng.random() < 0.5
    searches = [f"<think>{say(length)}</think>\n<search>{say(4)}</search>" for _ in range(2)]
    turns = [turn(text, encode, rng, [say(length + 5) for _ in range(3)]) for text in searches]
    turns.append(turn(f"<think>{say(length)}</think>\n<answer>{answer}</answer>", encode, rng, []))
    provenance: list[list[Any]] = [["prompt", 9]]
    for item in turns:
        provenance.append(["sampled", len(item["token_ids"])])
        if item["appended_by"]:
            provenance.append(["observation", 90])
    rest = {
        "outcome": outcome,
        "answer": answer,
        "error": "no connection" if void else None,
        "reward": None if void else right + 0.2 * rng.randint(0, 2),
        "components": None if void else {"answer": float(right), "format": 0.2},
        "exact_match": None if void else float(right),
        "judged": None,
        "valid_format": None if void else True,
        "retrieval_hit": None if void else right,
        "evidence": None,
        "provenance": provenance,
        "turns": turns,
    }
    values = [value for item in turns for value in item["logprobs"]]
    trainer = [round(value * (1 + rng.gauss(0, 0.03)), 4) for value in values]
    return json.dumps(rest)[1:-1], json.dumps(trainer)


def turn(text: str, encode: Encode, rng: random.Random, passages: list[str]) -> dict[str, Any]:
    """A turn; with passages it is a search that found them."""
    ids = encode(text)
    documents = [
        {"id": str(rng.randrange(60000)), "title": " ".join(passage.split()[:3]), "score": 7.25}
        for passage in passages
    ]
    lines = "".join(
        f"\nDoc {at}(Title: {' '.join(passage.split()[:3])}) {passage}"
        for at, passage in enumerate(passages, 1)
    )
    return {
        "sampled": text,
        "finish": "stop",
        "policy_version": 0,
        "token_ids": ids,
        # A trained policy is sure of most tokens.
        "logprobs": [round(-rng.expovariate(4 if rng.random() < 0.3 else 2000), 4) for _ in ids],
        "query": text.partition("<search>")[2].removesuffix("</search>") if documents else None,
        "search": "ok" if documents else None,
        "documents": documents,
        "search_seconds": 0.02 if documents else None,
        "appended": f"\n\n<information>{lines}\n</information>\n\n" if documents else "",
        "appended_by": "observation" if documents else None,
    }
