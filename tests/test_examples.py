"""The example of custom functions: short, complete, and its command is a configuration that passes."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from example import ROOT, SOURCE, custom_overrides
from searchrl.algorithm.advantages import compute_advantages
from searchrl.algorithm.importance import ImportanceInputs, correct
from searchrl.algorithm.losses import LossInputs, policy_loss
from searchrl.compose import load_config
from searchrl.config import Config
from searchrl.extensions import load_function
from searchrl.rewards import score
from searchrl.trajectory import Example, Finish, Outcome, ToolResult, Trajectory, Turn


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


def test_it_is_short() -> None:
    assert len(SOURCE.splitlines()) < 60


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
