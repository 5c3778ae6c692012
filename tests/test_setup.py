"""What a run is built from is refused early when it cannot be what the configuration asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from searchrl.config import Config, ConfigError, DataConfig, RewardConfig, RewardKind
from searchrl.setup import load_questions
from searchrl.trajectory import Message


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
