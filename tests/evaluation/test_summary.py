"""Rows, their order and their averages; published numbers beside ours; refusals of a resumed evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import PLAIN_RESULT
from searchrl.config import Config, ConfigError, DataConfig, EvalConfig
from searchrl.evaluation.benchmark import claim, eval_settings
from searchrl.evaluation.intervals import wilson
from searchrl.evaluation.published import BENCHMARKS, PUBLISHED
from searchrl.evaluation.results import Result, load_results, save_results
from searchrl.evaluation.summary import pass_at, summarize
from searchrl.evaluation.tables import published_table, result_table
from searchrl.trajectory import Example, Outcome


def answers(source: str, right: str, *, hops: int = 0) -> dict[str, list[Result]]:
    """A question for each word of ``right``, an answer for each of its digits: ``"10 11"``."""
    return {
        f"{source}{n}": [
            replace(
                PLAIN_RESULT,
                id=f"{source}{n}",
                data_source=source,
                hops=hops,
                exact_match=digit == "1",
                sampled_tokens=10 * n,
            )
            for digit in word
        ]
        for n, word in enumerate(right.split())
    }


def value(parts: Any, name: str, metric: str) -> float:
    interval = next(part for part in parts if part.name == name).metrics[metric]
    assert interval is not None
    return float(interval.value)


def test_sources_stand_in_published_order_and_others_behind_them() -> None:
    names = ["zebra", "bamboogle", "worldfacts", "nq", "musique", "2wikimultihopqa"]
    answered = {id_: r for name in names for id_, r in answers(name, "1 0").items()}
    parts = summarize(answered, seed=0)
    expected = ["nq", "2wikimultihopqa", "musique", "bamboogle", "worldfacts", "zebra", "all", "average"]
    assert [part.name for part in parts] == expected
    assert [part.name for part in summarize(answers("nq", "1 0"), seed=0)] == ["nq", "all"]


def test_the_average_weighs_sources_alike_and_all_weighs_questions() -> None:
    answered = answers("nq", "1 1 1 0 1 1") | answers("bamboogle", "0 0", hops=2)
    parts = summarize(answered, seed=0)
    assert value(parts, "all", "exact_match") == pytest.approx(5 / 8)
    assert value(parts, "average", "exact_match") == pytest.approx((5 / 6 + 0) / 2)
    assert value(parts, "2 hop", "exact_match") == 0
    assert value(parts, "nq", "sampled_tokens") == pytest.approx(25.0)
    average = parts[-1].metrics["exact_match"]
    assert average is not None
    assert 0.2 < average.low < average.value < average.high <= 0.5


def test_where_all_answers_are_alike_the_interval_is_wilson_s() -> None:
    parts = summarize(answers("nq", "0 0 0 0 0 0"), seed=0)
    assert parts[0].metrics["exact_match"] == wilson(0, 6)
    assert parts[0].metrics["recall_per_search"] is None  # nobody searched


@pytest.mark.parametrize("correct", range(6))
@pytest.mark.parametrize("drawn", range(1, 6))
def test_pass_at_j_is_the_mean_over_all_ways_to_draw(drawn: int, correct: int) -> None:
    samples = [n < correct for n in range(5)]
    ways = [any(way) for way in combinations(samples, drawn)]
    assert pass_at(drawn, correct=correct, samples=5) == pytest.approx(sum(ways) / len(ways))


def test_pass_at_k_is_any_and_pass_at_fewer_is_reported() -> None:
    parts = summarize(answers("nq", "00000 00001 11111 00110"), seed=0)
    assert [name for name in parts[0].metrics if "pass" in name] == ["pass@2", "pass@4", "pass@5"]
    assert value(parts, "nq", "pass@5") == 3 / 4
    assert value(parts, "nq", "exact_match") == pytest.approx((0 + 1 + 5 + 2) / 20)
    assert value(parts, "nq", "pass@2") == pytest.approx((0 + 0.4 + 1 + 0.7) / 4)


# --- tables ---------------------------------------------------------------------------------------------


def full_sets(sizes: Mapping[str, int]) -> dict[str, list[Result]]:
    return {id_: r for name, n in sizes.items() for id_, r in answers(name, "1 0 " * (n // 2)).items()}


def test_published_rows_agree_with_their_averages() -> None:
    assert sum(BENCHMARKS.values()) == 51_713
    for row in PUBLISHED:
        assert row.source.startswith("arXiv ")
        if row.exact_match is not None:
            assert len(row.exact_match) == len(BENCHMARKS)
            assert sum(row.exact_match) / 7 == pytest.approx(row.average, abs=6e-4)


def test_parts_of_the_benchmarks_are_marked_as_such() -> None:
    table = published_table(
        summarize(full_sets({"bamboogle": 4, "worldfacts": 2, "nq": 2}), seed=0), samples=1
    )
    assert table is not None
    assert table.columns == ("system", *BENCHMARKS, "average")
    assert table.rows[0] == ["this model (partial)", "0.500", *"-----", "0.500", "-"]
    assert table.rows[1] == ["  its questions", "2 of 3610", *"-----", "4 of 125", ""]
    first = ["0.421", "0.583", "0.413", "0.297", "0.274", "0.066", "0.128", "0.312"]
    assert table.rows[2] == ["Search-R1 GRPO, Qwen2.5-3B", *first]
    lines = ["GSPO + LLDS, Qwen2.5-3B", *"-------", "0.451"]
    assert lines in table.rows
    assert "Search-R1 GRPO, Qwen2.5-3B: arXiv 2503.09516v5, table 3" in table.note
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_whole_benchmarks_are_compared_without_a_mark() -> None:
    answered = answers("bamboogle", "1 " * 25 + "0 " * 100)
    table = published_table(summarize(answered, seed=0), samples=1)
    assert table is not None
    assert table.rows[0] == ["this model", *"------", "0.200", "-"]
    assert table.rows[1][0] == PUBLISHED[0].system


def test_our_average_stands_only_beside_theirs_if_it_is_over_the_same_seven() -> None:
    table = published_table(summarize(full_sets(dict.fromkeys(BENCHMARKS, 2)), seed=0), samples=1)
    assert table is not None
    assert table.rows[0][8] == "0.500"


def test_what_is_not_comparable_is_not_compared() -> None:
    assert published_table(summarize(answers("worldfacts", "1 0"), seed=0), samples=1) is None
    assert published_table(summarize(answers("nq", "10 00"), seed=0), samples=2) is None  # sampled


def test_tables_as_markdown() -> None:
    table = result_table(summarize(answers("nq", "1 0"), seed=0), samples=1, top_k=3, title="model on nq")
    lines = table.markdown().splitlines()
    assert lines[0] == "## model on nq"
    assert lines[2].startswith("| questions | n | EM [95 %] |")
    assert lines[3] == "| --- |" + " ---: |" * 9
    assert lines[4].startswith("| nq | 2 | 0.500 [0.000, 1.000] | 0.000 |")
    assert all(line.count("|") == 11 for line in lines[2:6])


# --- what is asked, and what was answered ---------------------------------------------------------------


def question(id_: str, source: str) -> Example:
    return Example(id=id_, question=f"{id_}?", golden_answers=("x",), data_source=source)


def model(folder: Path, weights: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_text(weights, encoding="utf-8")
    return folder


def test_an_evaluation_is_continued_under_the_same_settings_only(tmp_path: Path) -> None:
    cfg = Config(data=DataConfig(eval="test.jsonl"))
    folder, examples = model(tmp_path / "model", "a"), [question("a", "nq")]
    assert claim(tmp_path, eval_settings(cfg, folder, examples)) == {}
    assert claim(tmp_path, eval_settings(cfg, folder, examples)) == {}
    cfg.episode.deadline_s = 7.0  # decides nothing about the answers
    cfg.seed = 3  # greedy
    assert claim(tmp_path, eval_settings(cfg, folder, examples)) == {}

    def refusal() -> str:
        with pytest.raises(ConfigError) as caught:
            claim(tmp_path, eval_settings(cfg, folder, examples))
        return str(caught.value)

    cfg.episode.max_searches = 4
    assert refusal() == (
        f"resume=true cannot continue {tmp_path}/eval, which was begun with other settings:\n"
        "  - episode.max_searches: 2 there, 4 here\n"
        "restore them, or choose another name=..."
    )
    cfg.episode.max_searches = 2
    model(tmp_path / "model", "b")  # trained on
    assert "  - model files: " in refusal()
    model(tmp_path / "model", "a")
    cfg.eval = EvalConfig(samples=4, temperature=0.6)
    assert "  - samples: 'greedy' there, '4 at temperature 0.6, seed 3' here\n" in refusal()
    cfg.eval = EvalConfig()
    examples.append(question("b", "nq"))
    assert "  - questions: '1 of test.jsonl, sha256" in refusal()
    examples.pop()
    assert claim(tmp_path, eval_settings(cfg, folder, examples)) == {}


@given(
    st.lists(
        st.builds(
            replace,
            st.just(PLAIN_RESULT),
            id=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
            hops=st.integers(0, 4),
            outcome=st.sampled_from(Outcome),
            exact_match=st.booleans(),
            f1=st.floats(0, 1),
            searches=st.integers(0, 9),
            error=st.none() | st.text(),
        ),
        max_size=5,
    )
)
def test_results_are_read_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, some: list[Result]
) -> None:
    path = tmp_path_factory.getbasetemp() / "results" / "deep" / "after.json"
    save_results(path, some)
    assert load_results(path) == some
    assert all(isinstance(result.outcome, Outcome) for result in load_results(path))
