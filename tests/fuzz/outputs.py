"""Model outputs that nobody would write by hand, and what must hold of every episode that is made of them.

Everything is the real thing but the network: the tokenizer, vLLM's detokenizer with its stop strings, our
requests and their results, the episode, its masks, micro-batches, records and rewards. A case scripts what
the network would go on to sample; where a turn ends is vLLM's decision, token by token, as in the engine.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from random import Random
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from searchrl.batching import pack, pad
from searchrl.config import EpisodeConfig, RewardConfig, RewardKind, SamplingConfig
from searchrl.engine import Engine, Generation, GenerationRequest
from searchrl.engine.requests import sampling_params, to_generation
from searchrl.episodes import Rollout
from searchrl.protocol import STOP_STRINGS, TAGS, Action, Answer, Invalid, Protocol, Search, parse_action
from searchrl.records import trajectory_record
from searchrl.retrieval.wire import query_problem
from searchrl.rewards import score
from searchrl.trajectory import (
    Document,
    Example,
    Finish,
    Group,
    Outcome,
    Provenance,
    Sample,
    ToolCall,
    ToolResult,
    Trajectory,
)

TAG = re.compile(rf"<\s*/?\s*(?:{'|'.join(TAGS)})\s*>", re.IGNORECASE)
EXAMPLE = Example(id="q", question="Which river?", golden_answers=("Tiber",), data_source="fuzz")
REWARDS = (RewardConfig(kind=RewardKind.em_plus_format), RewardConfig(kind=RewardKind.search_r1))

WHOLE = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
ACTIONS = [
    "<search>rome river</search>",
    "<answer>Tiber</answer>",
    "<think>so</think>",
    "<search></search>",
    "<search> \n</search>",
    "<search>\0</search>",
    "<answer></answer>",
    "<search>a<answer>b</answer></search>",
    "<answer>a<search>b</search></answer>",
    "<search>a</answer>b</search>",
    "<answer>a</search></answer>",
    "<information>forged</information>",
]
BROKEN = [
    *("<search", "search>", "</search", "<search/>", "< search>", "</ search>", "<Search>", "</SEARCH>"),
    *("<<search>>", "<answer", "answer>", "</answer", "</answer >", "<\u200bsearch>", "<sea\0rch>"),
    *("&lt;search&gt;", "\uff1csearch\uff1e", "</search></search>", "</", "<", ">", ">\n\n", "/", "|"),
]
SPECIAL = [
    *("<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|im_end", "<|im_", "end|>", "|>", "<|"),
    *("<|IM_END|>", "<<|im_end|>|im_end|>", "[INST]", "</s>", "<s>", "<|im_\u200bend|>", "<0x0A>"),
]
WORDS = [
    *(
        "Tiber",
        " the",
        "q",
        " ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "東京",
        "é",
        "e\u0301",
        "🗼",
        "👩\u200d👧",
        "İ",
        "ß",
    ),
    *("\u202e", "\u2066", "\u200b", "\u200d", "\ufeff", "\0", "\x04", "\x1b[2J", "\x7f", "\ufffd", "x" * 300),
    *("\u2028", "\x85", "&#60;", '"', "\\", "{{ 1 }}", "{question}", "NaN", "1" * 40),
]

GROUPS = (WHOLE, ACTIONS, ACTIONS, BROKEN, SPECIAL, WORDS)
PLANES = ((0x00, 0x7F), (0x80, 0x2FF), (0x300, 0x36F), (0x2000, 0x206F), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF))


def text(random: Random, most: int = 6) -> str:
    """Up to so many fragments in a row."""
    return "".join(_fragment(random) for _ in range(random.randint(0, most)))


def _fragment(random: Random) -> str:
    if random.random() < 0.1:
        return "".join(chr(random.randint(*random.choice(PLANES))) for _ in range(random.randint(1, 4)))
    return random.choice(random.choice(GROUPS))


class Vocabulary:
    """A tokenizer with what the cases ask of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, size: int | None = None) -> None:
        """``size``: rows of the model's head, which may be more than the tokenizer knows."""
        self.tokenizer = tokenizer
        self.size = size or len(tokenizer)
        self._letters: dict[str, list[int]] = {}

    @cached_property
    def shards(self) -> list[int]:
        """Ids that hold a part of a character only; at most a thousand."""
        known = range(len(self.tokenizer))
        return [i for i in known if "\ufffd" in self.tokenizer.decode([i])][:1000] or [0]

    def encode(self, text: str, spelling: int) -> list[int]:
        """As a tokenizer would, as one that knows no special tokens, or letter by letter."""
        if spelling == 2:
            return [i for letter in text for i in self._letter(letter)]
        return self._encode(text, split=spelling == 1)

    def _letter(self, letter: str) -> list[int]:
        if letter not in self._letters:
            self._letters[letter] = self._encode(letter, split=True)
        return self._letters[letter]

    def _encode(self, text: str, *, split: bool) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split)
        return list(map(int, ids))


@dataclass(frozen=True)
class Case:
    """What the network would sample, what searches find, and the limits."""

    turns: tuple[tuple[int, ...], ...]
    """Outputs, one after another; where an episode ends, the next begins."""
    documents: tuple[str, ...]
    limits: EpisodeConfig
    fails_at: int
    """The search that fails; -1: none."""


def output(random: Random, vocabulary: Vocabulary) -> tuple[int, ...]:
    """The ids of one turn: text in several spellings, any ids of the head, and parts of characters."""
    if random.random() < 0.3:  # else hardly any search would be executed
        said = random.choice(WORDS) + random.choice(ACTIONS[:3]) + random.choice(ACTIONS) + text(random, 2)
        return tuple(vocabulary.encode(said, random.randint(0, 2)))
    ids: list[int] = []
    for _ in range(random.randint(1, 3)):
        kind = random.randint(0, 5)
        if kind == 0:
            ids += [random.randrange(vocabulary.size) for _ in range(random.randint(0, 12))]
        elif kind == 1:
            ids += [random.choice(vocabulary.shards) for _ in range(random.randint(1, 3))]
        else:
            ids += vocabulary.encode(text(random), random.randint(0, 2))
    return tuple(ids)


def make_case(random: Random, vocabulary: Vocabulary) -> Case:
    """Outputs, documents and limits."""
    return Case(
        turns=tuple(output(random, vocabulary) for _ in range(random.randint(2, 6))),
        documents=tuple(text(random) for _ in range(random.randint(0, 3))),
        limits=EpisodeConfig(
            prompt_template="{question}",
            max_searches=random.choice([3, 3, 2, 1, 0]),
            max_consecutive_invalid=random.choice([2, 3, 1]),
            max_turn_tokens=random.choice([400, 400, 400, 30, 1]),
            max_context_tokens=random.choice([4000, 1500, 300, 90]),
            max_observation_tokens=random.randint(32, 300),
            max_query_chars=random.choice([256, 5, 1]),
        ),
        fails_at=random.choice([-1, -1, -1, 0, 1]),
    )


@dataclass
class Replay:
    """In place of vLLM's scheduler and network: the next ids of the script, ended by vLLM's own rules."""

    vocabulary: Vocabulary
    turns: Sequence[Sequence[int]]
    policy_version: int = 3
    requests: list[GenerationRequest] = field(default_factory=list)
    sampled: list[Generation] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> Generation:
        number = len(self.requests)
        self.requests.append(request)
        script = self.turns[number] if number < len(self.turns) else ()
        generation = to_generation(self._complete(request, [*script, self.vocabulary.tokenizer.eos_token_id]))
        self.sampled.append(generation)
        return generation

    def _complete(self, request: GenerationRequest, script: Sequence[int]) -> Any:
        """The answer of a vLLM whose network samples ``script``, a token a step."""
        from vllm.logprobs import FlatLogprobs, Logprob
        from vllm.outputs import CompletionOutput
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        asked = EngineCoreRequest(
            request_id="0",
            prompt_token_ids=request.prompt_ids,
            mm_features=None,
            sampling_params=sampling_params(request),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        tokenizer: Any = self.vocabulary.tokenizer
        detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, asked)
        logprobs = FlatLogprobs()
        reason, stopped_by = None, None
        for token in script:
            is_eos = token == tokenizer.eos_token_id
            # Each its own, so that a shift by one shows.
            logprobs.append({token: Logprob(-(len(logprobs) + 1) / 64)})
            reason = "stop" if is_eos else "length" if len(logprobs) == request.max_tokens else None
            stopped_by = detokenizer.update([token], is_eos)
            if stopped_by is not None:
                reason = "stop"
            if reason is not None:
                break
        return CompletionOutput(
            index=0,
            text=detokenizer.get_next_output_text(finished=True, delta=False),
            token_ids=detokenizer.output_token_ids,
            cumulative_logprob=None,
            logprobs=logprobs,
            finish_reason=reason,
            stop_reason=stopped_by,
        )


@dataclass
class Shelf:
    """A search tool that always finds the same."""

    documents: tuple[Document, ...]
    fails_at: int
    calls: list[ToolCall] = field(default_factory=list)

    async def __call__(self, call: ToolCall, example: Example) -> ToolResult:
        from searchrl.tools import ToolError

        del example
        self.calls.append(call)
        if len(self.calls) - 1 == self.fails_at:
            raise ToolError("no answer")
        return ToolResult(documents=self.documents, seconds=0.0)


def check_case(vocabulary: Vocabulary, runner: asyncio.Runner, case: Case) -> Counter[str]:
    """Play episodes until every output was used, and check each; counts what there was."""
    seen: Counter[str] = Counter()
    left = case.turns
    while left:
        trajectory = check_episode(vocabulary, runner, replace(case, turns=left))
        seen[f"outcome {trajectory.outcome}"] += 1
        seen.update(f"turn ended by {turn.finish}" for turn in trajectory.turns)
        seen["searches"] += trajectory.num_searches
        seen["invalid turns"] += sum(turn.is_invalid for turn in trajectory.turns)
        seen["outputs"] += min(len(trajectory.turns), len(left))
        seen["sampled tokens"] += trajectory.num_sampled
        left = left[len(trajectory.turns) :] if trajectory.turns else ()
    return seen


def check_episode(vocabulary: Vocabulary, runner: asyncio.Runner, case: Case) -> Trajectory:
    """Play one episode and hold the promises against it."""
    engine = Replay(vocabulary, case.turns)
    documents = tuple(Document(id=str(n), contents=text, score=1.0) for n, text in enumerate(case.documents))
    shelf = Shelf(documents, case.fails_at)
    protocol = Protocol(vocabulary.tokenizer, case.limits)
    rollout = Rollout(engine=cast(Engine, engine), protocol=protocol, tool=shelf, limits=case.limits, seed=0)
    trajectory = runner.run(rollout.episode(EXAMPLE, SamplingConfig(), key="0/0"))
    check_stream(trajectory, engine, case.limits)
    check_provenance(trajectory, engine)
    check_actions(trajectory, engine, protocol, case)
    check_appended(trajectory, vocabulary, documents)
    check_batches(trajectory)
    check_record(trajectory)
    check_reward(trajectory, protocol)
    return trajectory


def check_stream(trajectory: Trajectory, engine: Replay, limits: EpisodeConfig) -> None:
    """What the engine was given at each turn is the prompt and everything recorded before it."""
    stream = list(trajectory.prompt_ids)
    assert len(engine.requests) == len(trajectory.turns)
    for request, generation, turn in zip(engine.requests, engine.sampled, trajectory.turns, strict=True):
        assert request.prompt_ids == stream
        assert (turn.token_ids, turn.logprobs) == (generation.token_ids, generation.logprobs)
        assert 0 < len(turn.token_ids) <= min(limits.max_turn_tokens, request.max_tokens)
        stream += turn.token_ids + turn.observation_ids
    assert trajectory.token_ids == stream
    assert len(stream) <= max(limits.max_context_tokens, len(trajectory.prompt_ids))


def check_provenance(trajectory: Trajectory, engine: Replay) -> None:
    """Every token has one provenance; the mask, derived here from the engine alone, is the sampled ones."""
    mask: list[bool] = []
    for request, generation in zip(engine.requests, engine.sampled, strict=True):
        mask += [False] * (len(request.prompt_ids) - len(mask)) + [True] * len(generation.token_ids)
    mask += [False] * (len(trajectory.token_ids) - len(mask))
    assert trajectory.loss_mask == mask
    tags = trajectory.provenance
    assert len(tags) == len(trajectory.token_ids) == len(trajectory.logprobs) == len(mask)
    assert [tag is Provenance.SAMPLED for tag in tags] == mask
    assert trajectory.num_sampled == sum(mask)
    sampled = [value for generation in engine.sampled for value in generation.logprobs]
    assert [value for value, chosen in zip(trajectory.logprobs, mask, strict=True) if chosen] == sampled
    assert not any(value for value, chosen in zip(trajectory.logprobs, mask, strict=True) if not chosen)


def check_actions(trajectory: Trajectory, engine: Replay, protocol: Protocol, case: Case) -> None:
    """The action is that of the whole output, and the turn ends with the token that completes it."""
    for number, turn in enumerate(trajectory.turns):
        assert turn.text == protocol.decode(turn.token_ids)
        action = protocol.parse(turn.text)
        before = protocol.decode(turn.token_ids[:-1])
        assert not any(stop in before for stop in STOP_STRINGS), "the engine went on after a stop string"
        if turn.finish is Finish.STOP:
            assert any(stop in turn.text for stop in STOP_STRINGS), "the engine stopped without a stop string"
        assert turn.is_invalid == isinstance(action, Invalid)
        if number < len(case.turns) and not isinstance(action, Invalid):
            assert turn.finish is Finish.STOP
            limit = engine.requests[number].max_tokens
            assert protocol.parse(protocol.decode(case.turns[number][:limit])) == action
        _check_action(action, turn.text, case.limits.max_query_chars)
    last = trajectory.turns[-1] if trajectory.turns else None
    answered = trajectory.outcome is Outcome.ANSWERED
    assert answered == (trajectory.answer is not None)
    if answered:
        assert last is not None
        assert protocol.parse(last.text) == Answer(text=str(trajectory.answer))


def _check_action(action: Action, text: str, max_query_chars: int) -> None:
    match action:
        case Search(call=call):
            assert len(call.query) <= max_query_chars
            assert query_problem(call.query) is None  # or a policy could void its own trajectory
            assert "</search>" in text
        case Answer(text=answer):
            assert answer == answer.strip()
            assert answer in text


def check_appended(trajectory: Trajectory, vocabulary: Vocabulary, documents: Sequence[Document]) -> None:
    """What the environment said is inert, whatever was found, and its ids decode to its text."""
    tokenizer = vocabulary.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_encoder.values()}
    names = [str(name) for name in tokenizer.all_special_tokens]
    for turn in trajectory.turns:
        if not turn.observation_ids:
            continue
        text = turn.observation_text
        assert tokenizer.decode(turn.observation_ids, skip_special_tokens=False) == text
        assert not special.intersection(turn.observation_ids)
        assert not any(name in text for name in names)
        assert all(
            parse_action(opening + text, 256) == Invalid() for opening in ("", "<search>", "<answer>", "<")
        )
        searched = turn.observation_provenance is Provenance.OBSERVATION
        assert searched == (turn.result is not None)
        assert TAG.findall(text) == (["<information>", "</information>"] if searched else [])
        if searched:
            assert text.count("\n") <= 5 + max(1, len(documents))  # what stands alone on a line is ours


def check_batches(trajectory: Trajectory) -> None:
    """Micro-batches train on the sampled tokens, with their log-probabilities, and on nothing else."""
    if not trajectory.prompt_ids:
        return
    samples = [Sample(trajectory=trajectory, advantage=float(n + 1), id=f"0/{n}") for n in range(2)]
    ids = [i for turn in trajectory.turns for i in turn.token_ids]
    values = [value for turn in trajectory.turns for value in turn.logprobs]
    for batch in (*pack(samples, 2 * len(trajectory.token_ids)), *pad(samples[:1], 1)):
        mask = batch.loss_mask
        count = sum(map(len, batch.sample_ids))
        assert batch.input_ids.shape == mask.shape == batch.sampling_logprobs.shape == batch.advantages.shape
        assert batch.input_ids[mask].tolist() == ids * count
        assert batch.sampling_logprobs[mask].tolist() == values * count  # sums of 64ths: exact in fp32
        assert not batch.sampling_logprobs[~mask].any()
        assert not batch.advantages[~mask].any()
        if batch.tree is not None:
            assert batch.tree.input_ids[0][batch.tree.node_of].tolist() == batch.input_ids[0].tolist()


def check_record(trajectory: Trajectory) -> None:
    """The line in the trajectory file says the same."""
    record = trajectory_record(Group(id=0, example=EXAMPLE, trajectories=[trajectory]), 0, {})
    line = json.dumps(record, ensure_ascii=False).encode()
    assert b"\n" not in line
    read = json.loads(line)
    assert [turn["token_ids"] for turn in read["turns"]] == [turn.token_ids for turn in trajectory.turns]
    tags = [tag for tag, count in read["provenance"] for _ in range(count)]
    assert tags == trajectory.provenance


def check_reward(trajectory: Trajectory, protocol: Protocol) -> None:
    """Rewards are finite, and a right answer stands in sampled text."""
    if trajectory.outcome.is_void:
        return
    for config in REWARDS:
        reward = score(trajectory, EXAMPLE, config, protocol.eos_text)
        assert 0.0 <= reward.total <= 1.2
        if reward.exact_match:
            assert "tiber" in trajectory.turns[-1].text.lower()
