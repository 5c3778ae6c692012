"""What a report is made of: the index and the chunks, tokens, curves, tables; and what it says of damage."""

from __future__ import annotations

import base64
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from builders import PLAIN_RESULT
from report.generated import byte_level, make_run
from searchrl.evaluation.results import save_results
from searchrl.models import STAMP
from searchrl.report import page, transcripts
from searchrl.report.command import main
from searchrl.report.errors import ReportError
from searchrl.report.page import payload, write_report
from searchrl.report.panels import chart_panels
from searchrl.report.rundir import RunReader, differing_settings, read_metrics
from searchrl.report.tokens import TokenTexts, find_tokenizer

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!-- ${alert(1)} \u2028 \U0001f600"


def opened(folder: Path) -> RunReader:
    reader = RunReader(folder)
    reader.refresh()
    return reader


def groups_of(chunk: bytes) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = json.loads(gzip.decompress(chunk))
    return groups


# --- trajectories ---------------------------------------------------------------------------------------


def test_every_trajectory_is_found_through_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several files and chunks: the transcript at a row's place is the row's own."""
    monkeypatch.setattr(transcripts, "CHUNK_CHARS", 20_000)
    reader = opened(make_run(tmp_path / "run", steps=3, groups=4, size=2))
    index, chunks = reader.data()["index"], list(reader.chunks.values())
    rows, groups = index["rows"], index["groups"]
    assert len(rows["group"]) == 24
    assert len(chunks) > 3, "no file has more than one"
    assert groups["step"] == [1] * 4 + [2] * 4 + [3] * 4
    written = [
        json.loads(line)
        for step in (1, 2, 3)
        for line in (tmp_path / f"run/trajectories/step-00000{step}.rank0.jsonl").read_text().splitlines()
    ]
    for row, record in enumerate(written):
        group = rows["group"][row]
        member = groups_of(chunks[groups["chunk"][group]])[groups["place"][group]]["members"][row % 2]
        assert f"{groups['id'][group]}/{rows['member'][row]}" == record["id"]
        assert groups["question"][group] == record["question"]
        assert [turn["text"] for turn in member["turns"]] == [turn["sampled"] for turn in record["turns"]]
        assert [turn["appended_tokens"] for turn in member["turns"]] == [90, 90, 0]
        assert rows["reward"][row] == record["reward"]


def test_the_trainers_logprobs_stand_beside_the_engines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, groups=1, size=2)
    lines = (run / "trainer_logprobs/step-000001.rank0.jsonl").read_text().splitlines()
    # The second was not trained on; another rank trained the first.
    (run / "trainer_logprobs/step-000001.rank0.jsonl").write_text("")
    (run / "trainer_logprobs/step-000001.rank1.jsonl").write_text(lines[0] + "\n")
    (group,) = groups_of(next(iter(opened(run).chunks.values())))
    first, second = group["members"]
    assert [v for turn in first["turns"] for v in turn["trainer"]] == json.loads(lines[0])["logprobs"]
    assert {turn["trainer"] for turn in second["turns"]} == {None}


def test_evaluations_are_told_from_training(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, groups=1, size=1)
    training = run / "trajectories/step-000001.rank0.jsonl"
    (run / "trajectories/eval-000000.rank0.jsonl").write_bytes(training.read_bytes())
    (run / "trajectories/eval.rank0.jsonl").write_bytes(training.read_bytes())
    groups = opened(run).data()["index"]["groups"]
    assert list(zip(groups["step"], groups["evaluation"], strict=True)) == [(0, 1), (0, 1), (1, 0)]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"id": "0/0", "question": "q", "turns": 3}',
        b'{"id": "0/9", "question": "q", "turns": [{}], "outcome": "answered", "provenance": []}',
        b'{"id": "0/9", "question": "q", "turns": [], "outcome": "unheard of", "provenance": []}',
        b'{"id": "9/0", "question": "q", "turns": [], "hops": "many"}',
        b"\xff\xfe",
    ],
)
def test_damaged_lines_are_counted_and_left_out(tmp_path: Path, line: bytes) -> None:
    run = make_run(tmp_path / "run", steps=1, groups=2, size=2)
    path = run / "trajectories/step-000001.rank0.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]) + b"\n")
    data = opened(run).data()
    columns = data["index"]["rows"]
    assert {name: len(values) for name, values in columns.items()} == dict.fromkeys(columns, 4)
    assert "Left out, since unreadable: 1 line of the trajectory files." in data["notes"]


def test_numbers_that_json_lacks_are_left_open(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, groups=1, size=1)
    path = run / "trajectories/step-000001.rank0.jsonl"
    record = json.loads(path.read_text())
    record["turns"][0]["logprobs"][0], record["reward"] = float("-inf"), float("nan")
    path.write_text(json.dumps(record) + "\n")
    reader = opened(run)
    assert reader.data()["index"]["rows"]["reward"] == [None]
    (group,) = groups_of(next(iter(reader.chunks.values())))
    assert group["members"][0]["turns"][0]["logprobs"][0] is None


def test_only_what_changed_is_read_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, groups=1, size=1)
    reader = RunReader(run)
    assert reader.refresh()
    assert not reader.refresh()
    before = list(reader.chunks)
    make_run(tmp_path / "more", steps=3, groups=1, size=1, seed=1)
    name = "trajectories/step-000003.rank0.jsonl"
    (run / name).write_bytes((tmp_path / "more" / name).read_bytes())
    assert reader.refresh()
    assert list(reader.chunks)[:2] == before
    assert len(reader.chunks) == 3
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/mean": 1.0}\n')
    assert reader.refresh()
    assert reader.data()["steps"] == [1, 2, 3]


# --- tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("<search>Rom", ["<search>", "R", "o", "m"]),
        ("é", ["", "é"]),
        ("a😀b", ["a", "", "", "", "😀", "b"]),
        ("", []),
    ],
)
def test_tokens_are_the_text_cut_up(text: str, pieces: list[str]) -> None:
    tokenizer = byte_level(["<search>"])
    ids = tokenizer.encode(text).ids
    assert TokenTexts(tokenizer).split(ids, text) == pieces


def test_a_character_cut_off_at_the_end_is_shown_as_the_engine_decoded_it() -> None:
    tokenizer = byte_level([])
    ids = tokenizer.encode("aé").ids[:-1]
    assert TokenTexts(tokenizer).split(ids, "a\ufffd") == ["a", "\ufffd"]


def test_another_models_tokenizer_is_noticed() -> None:
    tokenizer = byte_level([])
    assert TokenTexts(tokenizer).split(tokenizer.encode("abc").ids, "abd") is None


def test_words_without_their_space_are_cut_all_the_same() -> None:
    """As sentencepiece does it: a text's first word has no space before it, the same word later has."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    tokenizer.decoder = decoders.Metaspace()
    assert TokenTexts(tokenizer).split([0, 1, 1], "a b b") == ["a", " b", " b"]


def test_the_tokenizer_is_looked_for_where_the_model_was(tmp_path: Path) -> None:
    built = tmp_path / "assets/models/random-tiny"
    built.mkdir(parents=True)
    (built / "tokenizer.json").touch()
    (built / STAMP).write_text('{"source": "random:tiny seed 3"}')
    settings: dict[str, object] = {"model.path": "random:tiny", "assets": str(tmp_path / "assets")}
    assert find_tokenizer(tmp_path, settings) == built / "tokenizer.json"
    assert find_tokenizer(tmp_path, {**settings, "model.path": "random:tiny-untied"}) is None
    assert find_tokenizer(tmp_path, {**settings, "assets": str(tmp_path)}) is None
    assert find_tokenizer(tmp_path, {"model.path": str(built)}) == built / "tokenizer.json"
    assert find_tokenizer(tmp_path, {"model.path": "nobody/has-this", "checkpoint": ""}) is None
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").touch()
    assert find_tokenizer(tmp_path, settings) == tmp_path / "model/tokenizer.json"


def test_without_a_tokenizer_turns_stay_whole_and_the_page_says_so(tmp_path: Path) -> None:
    reader = opened(make_run(tmp_path / "run", steps=1, groups=1, size=1))
    (group,) = groups_of(next(iter(reader.chunks.values())))
    assert group["members"][0]["turns"][0]["tokens"] is None
    assert any("tokenizer.json is not on this machine" in note for note in reader.data()["notes"])


# --- curves and tables ----------------------------------------------------------------------------------


def test_records_of_a_step_complete_one_another(tmp_path: Path) -> None:
    lines = ['{"step": 2, "a": 1, "b": NaN}', '{"step": 1, "a": 0.5}', "{", '{"step": 2, "c": 3}', '{"a": 1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path) == ([1, 2], {"a": [0.5, 1.0], "b": [None, None], "c": [None, 3.0]}, 2)


@pytest.mark.parametrize(
    ("names", "nonzero", "comparing", "title", "labels"),
    [
        (["reward/mean", "reward/format"], ["reward/mean"], False, "Reward", ["reward"]),
        (["reward/mean"], [], False, "Reward", ["reward"]),
        (["time/step", "time/rollout"], ["time/step", "time/rollout"], False, "Time of a step", ["rollout"]),
        (["time/step", "time/rollout"], ["time/step", "time/rollout"], True, "Time of a step", ["time/step"]),
        (
            ["reward/exact_match", "reward/exact_match_1_hop", "reward/exact_match_2_hop"],
            ["reward/exact_match", "reward/exact_match_1_hop", "reward/exact_match_2_hop"],
            False,
            "Exact match",
            ["training", "training, 1 hop", "training, 2 hop"],
        ),
        (
            ["reward/exact_match", "reward/exact_match_2_hop"],
            ["reward/exact_match", "reward/exact_match_2_hop"],
            False,
            "Exact match",
            ["training"],
        ),
    ],
)
def test_panels_show_what_there_is(
    names: list[str], nonzero: list[str], comparing: bool, title: str, labels: list[str]
) -> None:
    (panel,) = [p for p in chart_panels(names, nonzero, comparing=comparing) if p["title"] == title]
    assert [series["label"] for series in panel["series"]] == labels


def test_a_panel_without_metrics_is_left_out() -> None:
    titles = {panel["title"] for panel in chart_panels(["loss/entropy"], ["loss/entropy"], comparing=False)}
    assert titles == {"Entropy", "Exact match", "Searches per trajectory"}, "two have evaluations"


def test_settings_are_compared_with_the_defaults() -> None:
    settings = {"name": "x", "steps": 7, "optimizer.betas": [0.9, 0.98], "group_size": 8, "of_an_older": None}
    assert differing_settings(settings) == [["steps", "7", "100"], ["of_an_older", "null", ""]]


def test_evaluations_have_intervals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, groups=1, size=1)
    results = [replace(PLAIN_RESULT, hops=1, exact_match=exact) for exact in (True, False)]
    save_results(run / "eval/step-000001.json", results)
    (run / "eval/step-000002.json").write_text("[{}]")
    data = opened(run).data()
    (evaluation,) = data["evaluations"]
    assert [part["name"] for part in evaluation["parts"]] == ["all", "1 hop"]
    exact = evaluation["parts"][0]["exact_match"]
    assert (exact["value"], round(exact["low"], 3), round(exact["high"], 3)) == (0.5, 0.095, 0.905)
    assert data["tables"][0]["rows"][0][:3] == ["all", "2", "0.500 [0.095, 0.905]"]
    (note,) = (note for note in data["notes"] if note.startswith("Left out"))
    assert note.startswith("Left out, since unreadable: eval/step-000002.json (")


# --- the page -------------------------------------------------------------------------------------------


def test_nothing_of_a_run_is_markup(tmp_path: Path) -> None:
    """Whatever a run says, its name included: the page has the scripts of an empty run, no other."""
    plain = make_run(tmp_path / "plain", steps=0, groups=0)
    run = make_run(tmp_path / "<img src=x onerror=a()>", steps=1, groups=1, size=1)
    path = run / "trajectories/step-000001.rank0.jsonl"
    path.write_text(path.read_text().replace("Which", json.dumps(HOSTILE)[1:-1]))
    (page_path,) = write_report([opened(run)], tmp_path / "out.html")
    (plain_path,) = write_report([opened(plain)], tmp_path / "plain.html")
    text, expected = page_path.read_text(encoding="utf-8"), plain_path.read_text(encoding="utf-8")
    assert "onerror=" not in text.replace("&lt;img src=x onerror=a()&gt;", "").replace(page_scripts(text), "")
    assert page_scripts(text) == page_scripts(expected)
    assert text.count("<script>") == expected.count("<script>") == len(page.SCRIPTS)
    assert text.count("<script type=") == expected.count("<script type=") + 1
    assert HOSTILE in json.loads(embedded(text, "data"))["runs"][0]["index"]["groups"]["question"][0]


def page_scripts(text: str) -> str:
    return "".join(re.findall(r"<script>.*?</script>", text, re.DOTALL))


def embedded(text: str, name: str) -> str:
    (found,) = re.findall(rf'id="{re.escape(name)}">([^<]*)</script>', text)
    return gzip.decompress(base64.b64decode(found)).decode()


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    (out,) = write_report([opened(make_run(tmp_path / "run", steps=1, groups=1))], tmp_path / "out.html")
    text = out.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "connect-src 'none'" in text
    assert re.findall(r"\b(?:src|href)=\"", text) == []


def test_large_runs_have_their_transcripts_beside_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "INLINE_LIMIT", 1000)
    reader = opened(make_run(tmp_path / "run", steps=2, groups=1, size=1))
    out, folder = write_report([reader], tmp_path / "out.html")
    assert 'id="chunk-' not in out.read_text(encoding="utf-8")
    assert sorted(path.name for path in folder.iterdir()) == [f"0_{name}.js" for name in reader.chunks]
    for name, chunk in reader.chunks.items():
        expected = f'report.store.deliver("0/{name}","{base64.b64encode(chunk).decode()}");\n'
        assert (folder / f"0_{name}.js").read_text() == expected
    (folder / "mine.txt").touch()
    monkeypatch.undo()
    assert write_report([reader], tmp_path / "out.html") == [out]
    assert [path.name for path in folder.iterdir()] == ["mine.txt"], "what others put there stays"


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / where / "run", steps=1, groups=1, size=1) for where in ("a", "b")]
    data = payload([opened(run) for run in runs])
    assert [run["name"] for run in data["runs"]] == [str(run) for run in runs]


# --- the command ----------------------------------------------------------------------------------------


def test_the_report_stands_in_the_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", steps=1, groups=1, size=1)
    main([str(run)])
    assert (run / "report.html").exists()
    main(["--compare", str(run), str(make_run(tmp_path / "other", steps=1, groups=1, size=1))])
    assert (run / "compare.html").exists()
    main([str(run), "--out", str(tmp_path / "new" / "x.html")])
    assert str(tmp_path / "new" / "x.html") in capsys.readouterr().out


def test_an_empty_run_has_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    main([str(tmp_path)])
    assert "The run has written nothing yet." in opened(tmp_path).data()["notes"]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (None, [], "is no folder; name a run directory"),
        ("folder", [], "is not a run directory: it has neither config.yaml nor metrics.jsonl"),
        ("run", ["--out", "/dev/null/report.html"], "cannot be written"),
        ("run", ["--watch", "--port", "70000"], "port 70000 cannot be used"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    tmp_path: Path, make: str | None, arguments: list[str], message: str
) -> None:
    run = tmp_path / "run"
    if make:
        run.mkdir()
    if make == "run":
        (run / "metrics.jsonl").touch()
    with pytest.raises(ReportError, match=re.escape(message)):
        main([str(run), *arguments])


@pytest.mark.parametrize("arguments", [[], ["runs/x", "--watch", "--out", "y.html"]])
def test_commands_without_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "searchrl report: error" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["a: [", "[1]", "\x00"])
def test_a_damaged_configuration_is_noted(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert any("config.yaml" in note for note in opened(tmp_path).data()["notes"])
