"""Twelve episodes, written by hand, played and scored for real: the summary is what one computes on paper.

The policy is a script where vLLM begins; rollout, protocol, scoring and summary are the real ones.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import pytest
from transformers import PreTrainedTokenizerFast

from searchrl.config import EpisodeConfig, SamplingConfig
from searchrl.distributed import World
from searchrl.engine import Engine, Generation, GenerationRequest
from searchrl.episodes import Rollout
from searchrl.evaluation.results import AnswerLog, Result, finished_questions
from searchrl.evaluation.rollouts import chunk_questions, evaluate
from searchrl.evaluation.summary import Part, summarize
from searchrl.evaluation.tables import result_table
from searchrl.failures import TooManyFailures
from searchrl.protocol import Protocol
from searchrl.tools import ToolError
from searchrl.trajectory import Document, Example, Finish, Group, Outcome, ToolCall, ToolResult

EOS = "<|im_end|>"
T = "<think>hm</think>"
SHELF = {
    "rome": ('"Rome"\nRome lies on the Tiber.',),
    "nile": ('"Nile"\nA river.', '"Africa"\nA continent.'),
    "sea": ('"Italy"\nWest of it is the Tyrrhenian Sea.',),
    "ghana": ('"Ghana"\nIts capital is Accra.',),
    "accra": (),
}


@dataclass(frozen=True)
class Case:
    """A question, and what the policy says in each turn of its two episodes."""

    example: Example
    first: tuple[str, ...]
    second: tuple[str, ...]


def case(
    source: str, hops: int, question: str, gold: str | tuple[str, ...], *episodes: tuple[str, ...]
) -> Case:
    golds = (gold,) if isinstance(gold, str) else gold
    example = Example(
        id=question,
        question=question,
        golden_answers=golds,
        data_source=source,
        metadata={"hops": hops},
    )
    return Case(example, *episodes)


CASES = (
    case(
        "nq",
        0,
        "Which river?",
        ("Tevere", "Tiber"),
        # right, after articles and punctuation; valid; one search, which shows the gold
        (f"{T}<search>rome</search>", f"{T}<answer>the Tiber.</answer>"),
        # one of two tokens: F1 = 2 x 1 / (2 + 1); contains the gold; no thought, so invalid
        ("<answer>Tiber River</answer>",),
    ),
    case(
        "nq",
        0,
        "Which year?",
        "1957",
        # F1 2/3, contains the gold, valid; one search without the gold
        (f"{T}<search>nile</search>", f"{T}<answer>in 1957</answer>"),
        # no action twice: no answer
        (f"I do not know.{EOS}", f"Really.{EOS}"),
    ),
    case(
        "nq",
        0,
        "Which sea?",
        "Tyrrhenian Sea",
        # F1 = 2 x 1 / (2 + 2); valid; the gold was shown
        (f"{T}<search>sea</search>", f"{T}<answer>Adriatic Sea</answer>"),
        # right in everything
        (f"{T}<search>sea</search>", f"{T}<answer>Tyrrhenian Sea</answer>"),
    ),
    case(
        "musique",
        2,
        "Which capital?",
        "Accra",
        # right; two searches, the second of which finds nothing
        (f"{T}<search>ghana</search>", f"{T}<search>accra</search>", f"{T}<answer>Accra</answer>"),
        # its second search fails: void, whatever the first found
        (f"{T}<search>ghana</search>", f"{T}<search>broken</search>"),
    ),
    case(
        "musique",
        2,
        "Which number?",
        "42",
        # searches in the forced-answer turn: turn limit
        (f"{T}<search>nile</search>",) * 3,
        # 142 contains 42 as characters only; no thought
        ("<answer>142</answer>",),
    ),
    case(
        "musique",
        4,
        "Is it so?",
        "yes",
        # never ends: token limit
        ("so " * 200,),
        # right without a search
        (f"{T}<answer>Yes</answer>",),
    ),
)


@dataclass
class Script:
    """Says for each episode what its case says; the first of a question to ask is its first episode."""

    tokenizer: PreTrainedTokenizerFast
    leads: bool = True
    policy_version: int = 0
    under_way: int = 0
    most: int = 0
    episodes: WeakKeyDictionary[Any, tuple[tuple[str, ...], list[int]]] = field(
        default_factory=WeakKeyDictionary
    )
    asked: dict[str, int] = field(default_factory=dict)

    async def generate(self, request: GenerationRequest) -> Generation:
        task = asyncio.current_task()
        if task not in self.episodes:
            prompt = self.tokenizer.decode(request.prompt_ids)
            found = next(c for c in CASES if c.example.question in prompt)
            before = self.asked.get(found.example.id, 0)
            self.asked[found.example.id] = before + 1
            self.episodes[task] = ((found.first, found.second)[before], [0])
        script, turn = self.episodes[task]
        ids = self.tokenizer.encode(script[turn[0]], add_special_tokens=False)
        turn[0] += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0)
        self.under_way -= 1
        finish = Finish.STOP
        if len(ids) > request.max_tokens:
            ids, finish = ids[: request.max_tokens], Finish.LENGTH
        return Generation(token_ids=ids, logprobs=[0.0] * len(ids), finish=finish)

    def run(self, runner: asyncio.Runner, work: Coroutine[Any, Any, list[Group]]) -> list[Group]:
        if self.leads:
            return runner.run(work)
        work.close()
        return []


async def search(call: ToolCall, example: Example) -> ToolResult:
    del example
    if call.query not in SHELF:
        raise ToolError("no connection")
    texts = SHELF[call.query]
    documents = tuple(Document(id=str(i), contents=text, score=1.0) for i, text in enumerate(texts))
    return ToolResult(documents=documents, seconds=0.0)


ALONE = World(rank=0, size=1, local_rank=0, device="cpu")
LIMITS = EpisodeConfig(prompt_template="{question}", max_searches=2, max_turn_tokens=100, top_k=2)


def played(
    tokenizer: PreTrainedTokenizerFast,
    *,
    samples: int,
    cases: Sequence[Case] = CASES,
    world: World = ALONE,
    max_failed_fraction: float = 0.1,
    keep: Callable[[Group, Sequence[Result]], None] = lambda *_: None,
) -> dict[str, list[Result]]:
    protocol = Protocol(tokenizer, LIMITS)
    script = Script(tokenizer, leads=world.leads_engine)
    rollout = Rollout(engine=cast(Engine, script), protocol=protocol, tool=search, limits=LIMITS, seed=0)
    with asyncio.Runner() as runner:
        answered = evaluate(
            rollout,
            runner,
            [(CASES.index(c), c.example) for c in cases],
            eos_text=protocol.eos_text,
            world=world,
            max_num_seqs=1,
            max_failed_fraction=max_failed_fraction,
            samples=samples,
            sampling=SamplingConfig(temperature=1.0),
            keep=keep,
        )
    assert script.most <= 4  # in chunks of four episodes
    return answered


def test_engines_share_the_questions_and_their_first_ranks_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Four ranks, two engines; each rank by itself, so that nothing is gathered."""
    ranks = [World(rank=n, size=4, local_rank=n, device="cpu", engine_size=2) for n in range(4)]
    answered = [list(played(tokenizer, samples=1, cases=CASES[:3], world=world)) for world in ranks]
    assert answered == [["Which river?", "Which sea?"], [], ["Which year?"], []]


def part(parts: Sequence[Part], name: str) -> Part:
    return next(p for p in parts if p.name == name)


def numbers(parts: Sequence[Part], name: str) -> dict[str, float | None]:
    metrics = part(parts, name).metrics
    return {m: None if v is None else v.value for m, v in metrics.items() if "tokens" not in m}


def test_two_answers_to_each_question(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = summarize(played(tokenizer, samples=2), seed=0)
    assert [p.name for p in parts] == ["nq", "musique", "2 hop", "4 hop", "all", "average"]
    assert [p.questions for p in parts] == [3, 3, 2, 1, 6, 6]
    nq = {
        "exact_match": 2 / 6,
        "pass@2": 2 / 3,
        "f1": (1 + 2 / 3 + 2 / 3 + 0 + 1 / 2 + 1) / 6,
        "sub_exact_match": 4 / 6,
        "valid_format": 4 / 6,
        "searches": 4 / 6,
        "recall": 3 / 6,
        "recall_per_search": 3 / 4,
        "gold_shown": 3 / 6,
    }
    musique = {
        "exact_match": 2 / 6,
        "pass@2": 2 / 3,
        "f1": 2 / 6,
        "sub_exact_match": 2 / 6,
        "valid_format": 2 / 6,
        "searches": (2 + 1 + 2 + 0 + 0 + 0) / 6,  # the first search of the void one was executed
        "recall": 1 / 6,
        "recall_per_search": 1 / 5,
        "gold_shown": 1 / 6,
    }
    assert numbers(parts, "nq") == pytest.approx(nq)
    assert numbers(parts, "musique") == pytest.approx(musique)
    assert numbers(parts, "average") == pytest.approx({name: (nq[name] + musique[name]) / 2 for name in nq})
    assert numbers(parts, "all")["recall_per_search"] == pytest.approx(4 / 9)
    assert numbers(parts, "2 hop")["exact_match"] == 1 / 4
    assert numbers(parts, "4 hop") == pytest.approx(
        dict.fromkeys(nq, 0.5)
        | {"pass@2": 1, "searches": 0, "recall": 0, "gold_shown": 0}
        | {"recall_per_search": None}
    )
    assert part(parts, "nq").outcomes == {Outcome.ANSWERED: 5, Outcome.NO_ANSWER: 1}
    assert part(parts, "musique").outcomes == {
        Outcome.ANSWERED: 3,
        Outcome.TURN_LIMIT: 1,
        Outcome.TOKEN_LIMIT: 1,
        Outcome.TOOL_FAILED: 1,
    }
    assert [p.void for p in parts] == [0, 1, 1, 0, 1, 1]
    table = result_table(parts, samples=2, top_k=2, title="t")
    assert table.columns[2:4] == ("EM avg@2 [95 %]", "pass@2 [95 %]")
    assert [row[0] for row in table.rows] == [p.name for p in parts]
    assert table.rows[0][4:8] == ["0.639", "0.667", "0.67", "0.500"]


def test_one_answer_to_each_question(tokenizer: PreTrainedTokenizerFast) -> None:
    answered = played(tokenizer, samples=1)
    parts = summarize(answered, seed=0)
    assert numbers(parts, "nq") == pytest.approx(
        {
            "exact_match": 1 / 3,
            "f1": (1 + 2 / 3 + 1 / 2) / 3,
            "sub_exact_match": 2 / 3,
            "valid_format": 1.0,
            "searches": 1.0,
            "recall": 2 / 3,
            "recall_per_search": 2 / 3,
            "gold_shown": 2 / 3,
        }
    )
    assert numbers(parts, "musique")["exact_match"] == 1 / 3
    assert part(parts, "all").void == 0
    table = result_table(parts, samples=1, top_k=2, title="t")
    assert table.columns == (
        "questions",
        "n",
        "EM [95 %]",
        "F1",
        "sub-EM",
        "searches",
        "recall@2",
        "sampled",
        "tokens",
        "void",
    )
    assert all(len(row) == len(table.columns) for row in table.rows)
    for c in CASES:
        (result,) = answered[c.example.id]
        spoken = [len(tokenizer.encode(text, add_special_tokens=False)) for text in c.first]
        assert result.sampled_tokens == sum(min(count, 100) for count in spoken)
        assert result.total_tokens > result.sampled_tokens


def test_too_many_failed_searches_stop_an_evaluation(tokenizer: PreTrainedTokenizerFast) -> None:
    kept: list[str] = []
    message = r"^1 of 8 trajectories are void, .*=0\.1 allows; what failed: no connection$"
    with pytest.raises(TooManyFailures, match=message):
        played(
            tokenizer,
            samples=2,
            cases=[CASES[2], CASES[3], CASES[0], CASES[1]],
            keep=lambda group, _: kept.append(group.example.id),
        )
    assert sorted(kept) == ["Which capital?", "Which sea?"]  # its chunk is kept, the next is not begun


def test_an_id_may_hold_what_others_take_for_the_end_of_a_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with AnswerLog(tmp_path / "t.jsonl", tmp_path / "results.rank0.jsonl") as log:

        def keep(group: Group, results: Sequence[Result]) -> None:
            log.write(replace(group, example=replace(group.example, id="a\u2028b\x85c")), results)

        played(tokenizer, samples=1, cases=CASES[:1], keep=keep)
    assert list(finished_questions(tmp_path)) == ["a\u2028b\x85c"]


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = played(tokenizer, samples=2)
    folder = tmp_path / "eval"
    trajectories = tmp_path / "trajectories" / "eval.rank0.jsonl"
    with AnswerLog(trajectories, folder / "results.rank0.jsonl", append=True) as log:
        played(tokenizer, samples=2, cases=CASES[:2], keep=log.write)
    with AnswerLog(tmp_path / "t1.jsonl", folder / "results.rank1.jsonl", append=True) as log:
        played(tokenizer, samples=2, cases=CASES[2:4], keep=log.write, max_failed_fraction=1.0)
    with (folder / "results.rank0.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "Which number?", "resu')  # killed here

    finished = finished_questions(folder)
    assert list(finished) == [
        c.example.id for c in CASES[:3]
    ]  # the fourth is void: its search is tried again
    assert finished == {id_: whole[id_] for id_ in finished}
    with AnswerLog(trajectories, folder / "results.rank0.jsonl", append=True) as log:
        rest = played(tokenizer, samples=2, cases=CASES[3:], keep=log.write, max_failed_fraction=1.0)
    assert finished | rest == whole
    lines = (folder / "results.rank0.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [CASES[i].example.id for i in (0, 1, 3, 4, 5)]

    records = [json.loads(line) for line in trajectories.read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in records[:4]] == ["0/0", "0/1", "1/0", "1/1"]
    assert records[0]["exact_match"] is True
    assert records[0]["turns"][0]["query"] == "rome"
    void = next(record for record in records if record["outcome"] == "tool_failed")
    assert void["exact_match"] is None
    assert void["error"] == "no connection"


@pytest.mark.parametrize(("max_num_seqs", "samples", "questions"), [(256, 1, 1024), (256, 5, 204), (1, 8, 1)])
def test_chunks_follow_the_engine(max_num_seqs: int, samples: int, questions: int) -> None:
    assert chunk_questions(max_num_seqs, samples) == questions
