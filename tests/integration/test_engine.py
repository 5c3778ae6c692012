"""The engine under episodes: many at once, seeded, stopped, cancelled, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from integration.launch import Checks, run_checks

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def checks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checks:
    return run_checks("engine_checks", tmp_path_factory.mktemp("engine"), tiny_model)


@pytest.fixture(scope="module")
def held_by_two(tp_checks: Checks) -> dict[str, Any]:
    """What an engine did that two ranks hold."""
    return tp_checks.results


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same tokens; log-probabilities up to the rounding that another batch size brings."""
    assert [one["token_ids"] for one in found] == [one["token_ids"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_a_request_gives_the_same_alone_and_in_a_crowd(checks: Checks, kind: str) -> None:
    results = checks.results["concurrency"][kind]
    assert_same(results["crowd"], results["alone"])
    assert [len(one["token_ids"]) for one in results["crowd"]] == results["limits"]
    assert {one["finish"] for one in results["crowd"]} == {"length"}


def test_prompts_beyond_one_step_wait_and_are_sampled_from_all_the_same(checks: Checks) -> None:
    """1,600 prompt tokens meet steps of 512: with a part of a prompt the CPU engine would fail."""
    results = checks.results["concurrency"]["long prompts"]
    assert_same(results["crowd"], results["alone"])


def test_another_seed_samples_otherwise(checks: Checks) -> None:
    ours = [one["token_ids"] for one in checks.results["concurrency"]["sampled"]["crowd"]]
    others = [one["token_ids"] for one in checks.results["concurrency"]["other seeds"]]
    assert sum(mine != other for mine, other in zip(ours, others, strict=True)) > len(ours) // 2


def test_a_stop_string_inside_a_token_ends_the_turn_and_the_token_stays_whole(checks: Checks) -> None:
    results = checks.results["stops"]
    stopped, ids = results["stopped"], results["stopped"]["token_ids"]
    assert stopped["finish"] == "stop"
    assert ids == results["free"][: len(ids)]
    assert len(stopped["logprobs"]) == len(ids)
    before, found, after = results["text"].partition(results["stop"])
    assert found
    assert before
    assert after  # the rest of the token that the stop string ended in


def test_cancelled_requests_leave_the_engine_and_the_others_alone(checks: Checks) -> None:
    results = checks.results["cancellation"]
    assert set(results["cancelled"]) == {"CancelledError"}
    assert_same(results["kept"], results["kept alone"])
    assert results["timed out"]
    assert_same(results["afterwards"], results["kept alone"][:1])


@pytest.mark.parametrize("after", ["cancel", "timeout", "at once"])
def test_the_engine_drops_what_was_cancelled(checks: Checks, after: str) -> None:
    assert checks.results["cancellation"][f"idle after {after}"]


def test_a_rollout_that_ends_early_leaves_the_engine_at_rest(checks: Checks) -> None:
    """Else weights could not be replaced: nothing steps the engine while the event loop stands still."""
    results = checks.results["early end"]
    assert 2 in results["ids"]
    assert len(results["ids"]) < 4  # somebody was aborted
    assert results["at rest"]
    assert results["early"] == results["alone"]


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        ("too long", "maximum context length is 512"),
        ("empty", "prompt cannot be empty"),
        ("no such token", "10000000 is out of vocabulary"),
    ],
)
def test_a_refused_request_fails_and_no_other(checks: Checks, refused: str, reason: str) -> None:
    running, beside, failed, behind = checks.results["refusals"][refused]
    assert failed.startswith("EngineError: the engine refuses the request: ")
    assert reason in failed
    assert_same([running, beside, behind], checks.results["refusals"]["alone"])


def test_a_failure_of_the_engine_reaches_everybody_and_leaves_nothing_behind(checks: Checks) -> None:
    results = checks.results["failure"]
    assert set(results["outcomes"]) == {"EngineError: the engine failed: RuntimeError('out of paper')"}
    assert_same(results["afterwards"], results["alone"])
    assert results["idle"]


@pytest.mark.parametrize("temperature", ["0.7", "1.0"])
def test_logprobs_are_those_of_the_trainer_at_the_same_temperature(checks: Checks, temperature: str) -> None:
    assert checks.results["trainer"][temperature] <= 1e-3


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_an_engine_of_two_ranks_gives_what_one_of_one_rank_gives(
    checks: Checks, held_by_two: dict[str, Any], kind: str
) -> None:
    first, second = held_by_two[kind]
    assert held_by_two["leaders"] == [True, False]
    assert_same(first, checks.results["concurrency"][kind]["alone"])
    assert second == []


def test_an_engine_of_two_ranks_is_at_rest_on_both_after_an_early_end(held_by_two: dict[str, Any]) -> None:
    first, second = held_by_two["early end"]
    assert first["at rest"]
    assert second["at rest"]
    assert 2 in first["ids"]
    assert len(first["ids"]) < 4
    assert first["early"] == first["alone"]


def test_an_engine_of_two_ranks_generates_only_where_both_take_part(held_by_two: dict[str, Any]) -> None:
    for told_by_rank in held_by_two["outside"]:
        assert told_by_rank.endswith("generate only in what Engine.run runs")


def test_an_episode_that_fails_ends_both_ranks_and_leaves_the_engine_whole(
    held_by_two: dict[str, Any],
) -> None:
    first, second = held_by_two["bad episode"]
    assert "LookupError('no such page')" in first["outcome"]
    assert "the rank that leads this engine failed" in second["outcome"]
    assert "LookupError('no such page')" in second["outcome"]
    assert max(first["seconds"], second["seconds"]) < 10
    assert_same(held_by_two["afterwards"][0], held_by_two["greedy"][0])


def test_ranks_that_sample_differently_are_found_out(held_by_two: dict[str, Any]) -> None:
    for rank in held_by_two["other seeds"]:
        assert "the ranks of an engine sampled different tokens" in rank["outcome"]


def test_a_rank_that_breaks_inside_a_step_ends_the_others(tp_checks: Checks) -> None:
    assert "RuntimeError: out of paper" in tp_checks.printed
    assert tp_checks.ended - tp_checks.results["failing at"] < 120  # seconds, where nothing else runs


def test_nothing_is_printed(checks: Checks) -> None:
    assert checks.printed == ""
