"""What a run is built from is refused early when it cannot be what the configuration asks for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from searchrl.config import (
    Config,
    ConfigError,
    DataConfig,
    RetrievalConfig,
    RetrievalKind,
    RewardConfig,
    RewardKind,
    WarmstartConfig,
)
from searchrl.data.errors import DataError
from searchrl.data.readers import read_examples
from searchrl.retrieval.corpus import CorpusError
from searchrl.setup import load_questions, oracle
from searchrl.trajectory import Message, ToolCall


def questions(path: Path, *metadata: dict[str, object]) -> str:
    rows = [
        {"id": f"q{n}", "question": "Where?", "golden_answers": ["Rome"], "data_source": "t", "metadata": m}
        for n, m in enumerate(metadata)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_reward_for_evidence_needs_questions_that_name_it(tmp_path: Path) -> None:
    complete = questions(tmp_path / "complete.jsonl", {"gold_passages": ["7"]}, {"gold_passages": ["8", "9"]})
    partial = questions(tmp_path / "partial.jsonl", {"gold_passages": ["7"]}, {})
    evidence = RewardConfig(kind=RewardKind.em_plus_evidence)

    # Held-out questions are scored by exact match, whatever training pays for.
    cfg = Config(data=DataConfig(train=complete, eval=partial), reward=evidence)
    assert [example.gold_passages for example in load_questions(cfg)[0]] == [("7",), ("8", "9")]

    cfg = Config(data=DataConfig(train=partial, eval=complete), reward=evidence)
    with pytest.raises(ConfigError) as caught:
        load_questions(cfg)
    assert str(caught.value) == (
        "reward.kind=em_plus_evidence pays for reading metadata.gold_passages, but question q1 of "
        f"{partial} names none; choose reward=em, or add them"
    )
    cfg.reward = RewardConfig(kind=RewardKind.em)
    assert len(load_questions(cfg)[0]) == 2


def test_ready_prompts_come_with_both_files(tmp_path: Path) -> None:
    files = []
    for name, prompt in (("train", "one"), ("eval", "two")):
        path = tmp_path / f"{name}.jsonl"
        row = {
            "id": "q",
            "question": "Where?",
            "golden_answers": ["Rome"],
            "data_source": "t",
            "chat": prompt,
        }
        path.write_text(json.dumps(row), encoding="utf-8")
        files.append(str(path))
    data = DataConfig(train=files[0], eval=files[1], prompt_column="chat")
    (train,), (held_out,) = load_questions(Config(data=data))
    assert train.prompt == (Message(role="user", content="one"),)
    assert held_out.prompt == (Message(role="user", content="two"),)


def test_an_evaluation_reads_training_questions_for_a_warm_start_only(tmp_path: Path) -> None:
    held_out = questions(tmp_path / "test.jsonl", {})
    cfg = Config(data=DataConfig(train=str(tmp_path / "none.jsonl"), eval=held_out))
    assert [len(part) for part in load_questions(cfg, training=False)] == [0, 1]
    cfg.warmstart = WarmstartConfig(demonstrations=4)
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        load_questions(cfg, training=False)
    cfg.checkpoint = "org/model"  # takes the warm start's place
    assert [len(part) for part in load_questions(cfg, training=False)] == [0, 1]


def test_an_oracle_finds_the_gold_passages_whatever_the_query(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"id": id_, "contents": f'"{id_}"\nAbout {id_}.'} for id_ in ("0", "1", "x", "9")]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = questions(tmp_path / "q.jsonl", {"gold_passages": ["9", "0"]}, {"gold_passages": ["x"]})
    cfg = Config(
        data=DataConfig(eval=path),
        retrieval=RetrievalConfig(kind=RetrievalKind.oracle, corpus=str(corpus)),
    )
    examples = read_examples(Path(path))
    tool = oracle(cfg, examples)
    found = [asyncio.run(tool(ToolCall(query="?"), example)).documents for example in examples]
    assert [[d.contents for d in documents] for documents in found] == [
        ['"9"\nAbout 9.', '"0"\nAbout 0.'],
        ['"x"\nAbout x.'],
    ]

    path = questions(tmp_path / "q.jsonl", {"gold_passages": ["9"]}, {})
    with pytest.raises(ConfigError) as caught:
        oracle(cfg, read_examples(Path(path)))
    assert str(caught.value) == (
        f"retrieval=oracle returns metadata.gold_passages, but question q1 of {path} names none; choose "
        "another retrieval, or questions that do"
    )
    path = questions(tmp_path / "q.jsonl", {"gold_passages": ["9", "7", "2"]})
    with pytest.raises(CorpusError) as missing:
        oracle(cfg, read_examples(Path(path)))
    assert str(missing.value) == (
        f"{corpus} holds no passage '2' (2 ids are missing); the questions name passages of another corpus"
    )
