"""Demonstrations: made from training questions, from what a search really returned, if it shows enough."""

from __future__ import annotations

import asyncio
import gc
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from searchrl.actor import init_communication
from searchrl.config import (
    Config,
    ConfigError,
    DeepSpeedConfig,
    DType,
    EpisodeConfig,
    ModelConfig,
    WarmstartConfig,
)
from searchrl.console import Console
from searchrl.distributed import init_world
from searchrl.policy import PolicyModel
from searchrl.protocol import Protocol
from searchrl.trajectory import Document, Example, Provenance, Sample, ToolCall, ToolResult
from searchrl.warmstart import WarmstartInputs, _demonstrations, publish, warmstart

GHANA = Document(id="1", contents='"Accra"\nAccra is the capital of Ghana.', score=1.0)
YEAR = Document(id="2", contents='"Ghana"\nGhana became independent in 1957.', score=1.0)
SHELF = {"Accra": GHANA, "Ghana independence": YEAR}


@dataclass(frozen=True)
class Shelf:
    """A tool with one document a query."""

    async def __call__(self, call: ToolCall, example: Example) -> ToolResult:
        del example
        return ToolResult(documents=(SHELF[call.query],), seconds=0.0)


def one_hop(number: int, *, gold: str = "1957", query: str = "Ghana independence") -> Example:
    return Example(
        id=f"one-{number}",
        question="When did Ghana become independent?",
        golden_answers=(gold,),
        data_source="test",
        metadata={"hops": 1, "gold_queries": [query]},
    )


TWO_HOPS = Example(
    id="two",
    question="When did the country of Accra become independent?",
    golden_answers=("1957",),
    data_source="test",
    metadata={"hops": 2, "bridge_answer": "Ghana", "gold_queries": ["Accra", "Ghana independence"]},
)


def demonstrations(
    tokenizer: PreTrainedTokenizerFast, examples: list[Example], config: WarmstartConfig
) -> list[Sample]:
    inputs = inputs_of(Path("unused"), tokenizer, examples)
    return asyncio.run(_demonstrations(config, inputs, random.Random(0)))


def inputs_of(model: Path, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> WarmstartInputs:
    return WarmstartInputs(
        model=model,
        tokenizer=tokenizer,
        protocol=Protocol(tokenizer, EpisodeConfig()),
        tool=Shelf(),
        examples=examples,
        fingerprint="",
    )


def sampled(sample: Sample) -> list[str]:
    return [turn.text for turn in sample.trajectory.turns]


def test_thoughts_lead_from_one_search_to_the_next(tokenizer: PreTrainedTokenizerFast) -> None:
    (sample,) = demonstrations(tokenizer, [TWO_HOPS], WarmstartConfig(demonstrations=1, two_hop_fraction=1.0))
    assert sampled(sample) == [
        "<think>I need to search.</think>\n<search>Accra</search>",
        "<think>It is Ghana. I need to search again.</think>\n<search>Ghana independence</search>",
        "<think>I found it.</think>\n<answer>1957</answer>",
    ]


def test_without_thoughts_the_policy_only_acts(tokenizer: PreTrainedTokenizerFast) -> None:
    config = WarmstartConfig(demonstrations=1, two_hop_fraction=0.0, thoughts=False)
    (sample,) = demonstrations(tokenizer, [one_hop(0)], config)
    assert sampled(sample) == ["<search>Ghana independence</search>", "<answer>1957</answer>"]


def test_what_was_found_is_read_and_not_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    (sample,) = demonstrations(tokenizer, [one_hop(0)], WarmstartConfig(demonstrations=1, two_hop_fraction=0))
    trajectory = sample.trajectory
    learnt = [token for token, loss in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if loss]
    assert tokenizer.decode(learnt) == "".join(sampled(sample))
    assert "Ghana became independent in 1957." in trajectory.turns[0].observation_text
    assert trajectory.provenance.count(Provenance.OBSERVATION) == len(trajectory.turns[0].observation_ids)


def test_a_search_that_does_not_show_the_answer_is_no_demonstration(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    unanswerable = [one_hop(n, gold="1960") for n in range(1, 4)]
    lost = Example(
        id="lost",
        question=TWO_HOPS.question,
        golden_answers=("1957",),
        data_source="test",
        metadata=TWO_HOPS.metadata | {"bridge_answer": "Togo"},  # the first search does not show it
    )
    config = WarmstartConfig(demonstrations=2, two_hop_fraction=0.5)
    samples = demonstrations(tokenizer, [*unanswerable, one_hop(0), lost, TWO_HOPS], config)
    assert {sample.id for sample in samples} == {"demonstration/one-0", "demonstration/two"}


def test_too_few_usable_questions_are_an_error_that_says_what_to_do(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ConfigError, match=r"demonstrations=4 needs 3 .* 1 hop.* there are 1: lower it"):
        demonstrations(tokenizer, [one_hop(0), TWO_HOPS], WarmstartConfig(demonstrations=4))


def test_of_two_runs_that_make_the_same_model_the_first_one_counts(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name, encoding="utf-8")
        publish(tmp_path / name, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "config.json").read_text(encoding="utf-8") == "first"


def test_a_model_is_not_published_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").touch()
    (tmp_path / "partial").mkdir()
    with pytest.raises(OSError, match="not empty"):
        publish(tmp_path / "partial", tmp_path / "model")


@pytest.mark.integration
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_no_network_and_no_moments_stay_in_memory(
    zero_stage: int, tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The engine and the trained actor load beside what stays: 16 bytes a parameter, if it is not let go."""
    gc.collect()
    before = {id(one) for one in gc.get_objects() if type(one) is PolicyModel}
    cfg = Config(
        assets=str(tmp_path),
        model=ModelConfig(dtype=DType.float32),
        deepspeed=DeepSpeedConfig(zero_stage=zero_stage),
        warmstart=WarmstartConfig(demonstrations=2, two_hop_fraction=0.0, epochs=1),
    )
    world = init_world("cpu")
    init_communication(world)
    with asyncio.Runner() as runner:
        inputs = inputs_of(tiny_model, tokenizer, [one_hop(1), one_hop(2)])
        folder = warmstart(cfg, inputs, world=world, runner=runner, console=Console(enabled=False))
    assert (folder / "model.safetensors").exists()
    # Without a collection: what would wait for one waits until long after the engine has taken its memory.
    assert {id(one) for one in gc.get_objects() if type(one) is PolicyModel} <= before
