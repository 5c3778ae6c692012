"""The examples: short, complete, and their commands are configurations that pass."""

from __future__ import annotations

import asyncio
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from example import ROOT, custom_overrides
from searchrl.algorithm.advantages import compute_advantages
from searchrl.algorithm.importance import ImportanceInputs, correct
from searchrl.algorithm.losses import LossInputs, policy_loss
from searchrl.compose import load_config
from searchrl.config import Config
from searchrl.data.readers import read_examples
from searchrl.extensions import load_function
from searchrl.retrieval.corpus import Corpus
from searchrl.rewards import score
from searchrl.trajectory import Document, Example, Finish, Outcome, ToolResult, Trajectory, Turn


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """What the docstring's command composes, run where ``examples`` stands."""
    monkeypatch.chdir(ROOT)
    files = []
    for name in ("data.train", "data.eval", "retrieval.corpus"):
        path = tmp_path / f"{name}.jsonl"
        path.touch()
        files.append(f"{name}={path}")
    return load_config([*custom_overrides(), *files])[0]


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.name)
def test_an_example_is_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) < 60


def test_the_reward_costs_searches(cfg: Config) -> None:
    frugal = load_function(cfg.reward.import_path, cfg.reward.kwargs, section="reward", positional=2)
    turn = Turn(token_ids=[2], logprobs=[-1.0], text="", finish=Finish.STOP, policy_version=0)
    searched = replace(turn, result=ToolResult(documents=(), seconds=0.1), observation_ids=[3])
    trajectory = Trajectory(prompt_ids=[1], turns=[searched, turn], outcome=Outcome.ANSWERED, answer="Lisbon")
    example = Example(id="q", question="?", golden_answers=("Lisbon",), data_source="t")
    reward = score(trajectory, example, cfg.reward, "<eos>", custom=frugal(trajectory, example))
    assert (reward.total, reward.exact_match) == (0.95, 1.0)


def test_the_advantages_are_ranks(cfg: Config) -> None:
    ranks = load_function(cfg.advantage.import_path, cfg.advantage.kwargs, section="advantage", positional=1)
    groups = [[0.0, 5.0, 1.0], [1.0, 1.0], [2.0, 0.0, 2.0]]
    found = compute_advantages(groups, cfg.advantage, zero_variance_filter=True, custom=ranks)
    assert found == [[-1.0, 1.0, 0.0], None, [0.5, -1.0, 0.5]]


def test_the_loss_halves_negative_advantages(cfg: Config) -> None:
    softer = load_function(cfg.loss.import_path, cfg.loss.kwargs, section="loss", positional=1)
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        advantages=torch.tensor([1.0, -1.0]),
        trajectory_index=torch.tensor([0, 1]),
        turn_index=torch.tensor([0, 1]),
    )
    outputs = policy_loss(inputs, cfg.loss, softer)
    assert outputs.token_losses.tolist() == [1.0, -1.0]
    outputs.token_losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, 0.5]


def test_the_weights_stay_below_their_bound(cfg: Config) -> None:
    smooth = load_function(
        cfg.importance.import_path, cfg.importance.kwargs, section="importance", positional=1
    )
    inputs = ImportanceInputs(
        old_logprobs=torch.tensor([-1.0, -1.0, -1.0]),
        sampling_logprobs=torch.tensor([-1.0, -9.0, -1000.0]),
        trajectory_index=torch.tensor([0, 0, 1]),
        trajectory_ids=["a", "b"],
    )
    weights = correct(inputs, cfg.importance, smooth).weights
    assert weights.tolist() == pytest.approx([2 * 0.46211716, 2.0, 2.0])


# --- docs/rewards.md --------------------------------------------------------------------------------------

REWARDS = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    searchrl (.*)$", REWARDS.replace("\\\n", " "), re.MULTILINE)
(GROUP_REWARD,) = re.findall(r"```python\n(.*?)```", REWARDS, re.DOTALL)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the page's own function and, empty, the data that its commands name."""
    folder = tmp_path / "assets" / "worldfacts"
    folder.mkdir(parents=True)
    for name in ("train", "dev", "test", "corpus"):
        (folder / f"{name}.jsonl").touch()
    (tmp_path / "mine.py").write_text(GROUP_REWARD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_on_rewards_compose(command: str) -> None:
    load_config(shlex.split(command)[1:])


@pytest.mark.usefixtures("data")
def test_the_group_reward_of_the_page_shares() -> None:
    function = load_function("mine:shared", {}, section="reward", positional=2)
    turn = Turn(token_ids=[2], logprobs=[-1.0], text="", finish=Finish.STOP, policy_version=0)
    members = [
        Trajectory(prompt_ids=[1], turns=[turn], outcome=Outcome.ANSWERED, answer=answer)
        for answer in ("Rome", "Lisbon", "rome")
    ]
    example = Example(id="q", question="?", golden_answers=("Rome",), data_source="t")
    assert len(COMMANDS) == 3
    assert function(members, example) == [0.5, 0.0, 0.5]


# --- a tool, questions and a corpus of one's own ----------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], Any]]:
    """Imports an example as one does in the folder that holds ``examples``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield lambda name: importlib.import_module(f"examples.{name}")


def told(example: Callable[[str], Any], query: str, **kwargs: object) -> str:
    """What the calculator says, as the policy reads it."""
    (found,) = asyncio.run(example("calculator").Calculator(**kwargs).search(query, 3))
    assert isinstance(found, Document)
    return found.contents.rpartition("\n")[2]


MISTAKE = "This cannot be calculated: write numbers, + - * / and brackets."


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("2 + 3 * 4", "14"),
        (" (2 + 3) * -4 ", "-20"),
        ("1 / 3", "0.333333"),
        ("10 / 4 - 2.5", "0.0"),
        ("1e308 * 10", "inf"),
        ("1 / 0", MISTAKE),
        ("", MISTAKE),
        ("2 ** 64", MISTAKE),
        ("9 if 1 else 2", MISTAKE),
        ("__import__('os').getcwd()", MISTAKE),
        ("x", MISTAKE),
        ("'2' * 9", MISTAKE),
        ("twelve apples", MISTAKE),
        ("(" * 250, MISTAKE),
        ("\ud800", MISTAKE),
    ],
)
def test_the_calculator(example: Callable[[str], Any], query: str, said: str) -> None:
    assert told(example, query) == said


def test_the_calculator_rounds_as_it_is_told(example: Callable[[str], Any]) -> None:
    assert told(example, "2 / 3", digits=2) == "0.67"


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@given(query=st.text(st.sampled_from("0123456789.eE+-*/() _jx'[]\n"), max_size=256))
def test_no_query_breaks_the_calculator(example: Callable[[str], Any], query: str) -> None:
    said = told(example, query)
    assert said == MISTAKE or float(said) is not None


def test_the_sums_are_questions_that_the_calculator_answers(
    example: Callable[[str], Any], tmp_path: Path
) -> None:
    example("sums").main(tmp_path / "sums")
    train, test = (
        read_examples(tmp_path / "sums" / f"{name}.jsonl", prompt_column="prompt")
        for name in ("train", "test")
    )
    assert (len(train), len(test)) == (2000, 500)
    assert {one.question for one in train} & {one.question for one in test} == set()
    for one in train[:20]:
        queries = one.metadata["gold_queries"]
        assert isinstance(queries, list)
        assert tuple(told(example, query) for query in queries) == one.golden_answers
        assert one.prompt is not None
        assert one.prompt[-1].content.endswith(one.question)


def test_the_command_of_the_calculator_composes(
    example: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = re.search(r"searchrl train (.*?)\n\n", example("calculator").__doc__, re.DOTALL)
    assert command is not None
    example("sums").main(tmp_path / "assets" / "sums")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    cfg, _ = load_config(shlex.split(command[1].replace("\\\n", " ")))
    assert cfg.retrieval.kwargs == {"digits": 4}


def test_a_corpus_of_text_files_is_one_that_is_searched(
    example: Callable[[str], Any], tmp_path: Path
) -> None:
    (tmp_path / "towns.txt").write_text(
        "Accra lies in Ghana.\n\n" + "word " * 99 + "\n\nLima lies in Peru.\n"
    )
    (tmp_path / "empty.txt").write_text("\n\n")
    example("corpus").main(tmp_path / "c" / "corpus.jsonl", [tmp_path / "towns.txt", tmp_path / "empty.txt"])
    corpus = Corpus(tmp_path / "c" / "corpus.jsonl")
    first, second = (corpus[row].contents for row in range(len(corpus)))
    assert first.startswith('"towns"\nAccra lies in Ghana. word word')
    assert second == '"towns"\nLima lies in Peru.'
    corpus.close()
