"""The last lines of a run: numbers by hand, and only places that exist."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from builders import PLAIN_RESULT
from searchrl.evaluation.closing import closing_lines, commands
from searchrl.evaluation.results import Result

STEP = {"rollout/groups_sampled": 6.0, "rollout/groups_aborted": 2.0, "rollout/void": 0.25, "time/step": 10.0}
RECORDS = [
    {"step": 0, "eval/exact_match": 0.0},
    {"step": 1, **STEP, "time/rollout": 5.0, "time/logprob": 1.0, "time/update": 3.0, "time/sync": 0.5},
    {
        "step": 2,
        **STEP,
        "rollout/groups_aborted": 0.0,
        "rollout/void": 0.0,
        "time/step": 30.0,
        "time/rollout": 9.0,
    },
]


def results(matches: str) -> list[Result]:
    return [replace(PLAIN_RESULT, id=str(n), exact_match=match == "1") for n, match in enumerate(matches)]


def values(text: str) -> dict[str, str]:
    lines = [re.fullmatch(r"(.{12})  (\S.*)", line) for line in text.splitlines()]
    return {line[1].rstrip(): line[2] for line in lines if line is not None}


def test_what_was_reached_and_what_it_took(tmp_path: Path) -> None:
    said = values(
        closing_lines(tmp_path, RECORDS, group_size=4, before=results("0100"), after=results("1101"))
    )
    assert said == {
        "exact match": "0.250 before, 0.750 after; difference 0.500 [-0.066, 1.066] on 4 questions",
        "steps": "2; 40 trajectories, 10.0% of them void",
        "time": "40s in steps: rollout 35%, logprob 2%, update 8%, sync 1%",
    }


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (None, "1101", "0.750 [0.301, 0.954] on 4 questions"),
        ("0", "1", "1.000 [0.207, 1.000] on 1 questions"),
    ],
)
def test_without_a_comparison_there_is_the_result(
    before: str | None, after: str, said: str, tmp_path: Path
) -> None:
    earlier = None if before is None else results(before)
    text = closing_lines(tmp_path, [], group_size=4, before=earlier, after=results(after))
    assert values(text) == {"exact match": said}


def test_only_places_that_exist_are_named(tmp_path: Path) -> None:
    for name in ("model", "trajectories", "eval"):
        (tmp_path / name).mkdir()
    (tmp_path / "metrics.jsonl").touch()
    text = closing_lines(tmp_path, RECORDS, group_size=4, before=None, after=results("1"))
    named = [value for value in values(text).values() if value.startswith(str(tmp_path))]
    assert {Path(value).name for value in named} == {"model", "trajectories", "eval", "metrics.jsonl"}
    assert all(Path(value).exists() for value in named)


def test_the_commands_can_be_typed() -> None:
    overrides = [
        "+experiment=smoke",
        "name=a",
        "steps=3",
        "resume=true",
        "processes=2",
        "loss={kl_coef: 0.1}",
        "+reward.kwargs.cost=1",
        "optimizer.warmup_steps=1",
    ]
    report, evaluation, play = (
        shlex.split(line[14:]) for line in commands(Path("my runs/a"), overrides).splitlines()
    )
    assert report == ["searchrl", "report", "my runs/a"]
    kept = ["+experiment=smoke", "+reward.kwargs.cost=1"]
    assert evaluation == [
        "searchrl",
        "eval",
        kept[0],
        "processes=2",
        kept[1],
        "name=a_eval",
        "checkpoint=my runs/a/model",
    ]
    assert play == ["searchrl", "play", *kept, "checkpoint=my runs/a/model"]
