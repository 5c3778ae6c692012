"""What is not finite stops every rank before the step, names its trajectories, and can be replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from integration.launch import Checks
from integration.scripts.guard_checks import SAMPLES
from searchrl.dumps import read_dump
from searchrl.replay import replay

pytestmark = pytest.mark.integration

STAGES = (0, 1, 2, 3)
IN_DATA = {  # case: what the message says; 5/0 is the trajectory that was hurt
    "engine": "the engine's log-probabilities are NaN or infinite at 1 of",
    "advantage": "the advantage is NaN or infinite in trajectories 5/0",
}
IN_NUMBERS = {
    **{f"loss/zero{stage}": "the trainer's log-probabilities are NaN or infinite" for stage in STAGES},
    **{f"gradient/zero{stage}": "the gradient's norm is" for stage in STAGES},
    "reference": "the reference's log-probabilities are NaN or infinite",
    "old": "the trainer's log-probabilities are NaN or infinite",
}
CASES = IN_DATA | IN_NUMBERS


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def measured(ranks: int, update_checks: dict[int, tuple[Path, Checks]]) -> dict[str, Any]:
    guards: dict[str, Any] = update_checks[ranks][1].results["guards"]
    return guards


def test_every_case_was_tried(measured: dict[str, Any]) -> None:
    assert measured.keys() == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_stop_with_the_same_words(measured: dict[str, Any], case: str, ranks: int) -> None:
    messages = measured[case]["messages"]
    assert len(messages) == ranks
    assert len(set(messages)) == 1
    assert messages[0].startswith("stopped before the optimizer's step: ")
    assert CASES[case] in messages[0]
    assert "searchrl replay " in messages[0]


@pytest.mark.parametrize("case", CASES)
def test_no_weight_has_moved(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["unchanged"]


@pytest.mark.parametrize("case", CASES)
def test_the_dump_holds_the_named_trajectories(measured: dict[str, Any], case: str, ranks: int) -> None:
    folder, message = Path(measured[case]["folder"]), measured[case]["messages"][0]
    dumps = sorted(path for path in folder.iterdir() if path.name.startswith("step-000001.rank"))
    if case.startswith("gradient"):
        assert len(dumps) == ranks  # the gradient is a sum over all of them
    elif case == "loss/zero3":
        assert len(dumps) == ranks  # they share the weight
    elif case not in IN_DATA:
        assert [path.name for path in dumps] == [f"step-000001.rank{ranks - 1}"]  # who was hurt
    assert dumps
    for path in dumps:
        dump = read_dump(path)
        ids = [sample.id for sample in dump.evidence.samples]
        assert sorted(ids) == sorted(dump.evidence.fault.ids)
        assert all(name in message for name in ids)
        for sample in dump.evidence.samples:
            if case not in IN_DATA:
                assert sample == next(each for each in SAMPLES if each.id == sample.id)
    if case in IN_DATA:
        assert "5/0" in message


@pytest.mark.parametrize("case", ["engine", "advantage", "loss/zero0", "loss/zero3", "old"])
def test_replay_shows_it_again(
    measured: dict[str, Any], case: str, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = min(Path(measured[case]["folder"]).glob("*.rank*"))
    figures = replay(path, model=None, device="cpu")
    printed = " ".join(capsys.readouterr().out.split())
    if case in IN_DATA:
        assert [each.id for each in figures if each.fault] == ["5/0"]
        assert "forward: every output is finite" in printed
    elif ranks == 2 and case == "old":
        # The weights saved are the first rank's. What the hurt one computed with its own stands in the dump.
        assert all("the loss is NaN or infinite" in each.fault for each in figures)
        assert "forward: every output is finite" in printed
    elif ranks == 2 and case != "loss/zero3":
        # The weights saved are the first rank's, which differ from those of the one that was hurt.
        assert "together in one micro-batch: finite as well" in printed
    else:
        assert all("the trainer's log-probabilities" in each.fault for each in figures)
        assert "that of model.layers.1.mlp.up_proj (Linear)" in printed
        assert "its input is finite, and 1 of its own weights are not" in printed
