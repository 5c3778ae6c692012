from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from searchrl.data import DataError, read_examples
from searchrl.data.readers import first_of_each_source
from searchrl.trajectory import Example, Message

ROW: dict[str, object] = {
    "id": "a",
    "question": "Who?",
    "golden_answers": ["Ann", "Anna"],
    "data_source": "set",
    "metadata": {"hops": 2},
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_become_examples_in_order(tmp_path: Path) -> None:
    bare = {key: value for key, value in ROW.items() if key != "metadata"} | {"id": "b\u2028"}
    path = write(tmp_path / "x.jsonl", ROW, bare)
    path.write_text(path.read_text() + "\n  \n", encoding="utf-8")
    first, second = read_examples(path)
    assert first == Example(
        id="a", question="Who?", golden_answers=("Ann", "Anna"), data_source="set", metadata={"hops": 2}
    )
    assert first.hops == 2
    assert (second.id, second.metadata) == ("b\u2028", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 3}, "field 'id': expected a string, got 3"),
        ({"id": " "}, "field 'id': empty"),
        ({"question": ""}, "field 'question': empty"),
        ({"question": None}, "field 'question': expected a string"),
        ({"golden_answers": []}, "field 'golden_answers': expected a list with at least one"),
        ({"golden_answers": "Ann"}, "field 'golden_answers': expected a list"),
        ({"golden_answers": ["Ann", " "]}, "field 'golden_answers': empty"),
        ({"golden_answers": [1]}, "field 'golden_answers': expected a string, got 1"),
        ({"data_source": ["x"]}, "field 'data_source': expected a string"),
        ({"metadata": []}, "field 'metadata': expected an object"),
    ],
)
def test_a_bad_value_names_line_and_field(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write(tmp_path / "x.jsonl", ROW, ROW | {"id": "b"} | change)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert f"{path}, line 2, {message}" in str(caught.value)


@pytest.mark.parametrize("field", ["id", "question", "golden_answers", "data_source"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "x.jsonl", {key: value for key, value in ROW.items() if key != field})
    with pytest.raises(DataError, match=f"line 1, field '{field}': missing"):
        read_examples(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (b"{", "line 1: not valid JSON"),
        (b"[" * 100_000, "line 1: not valid JSON"),
        (b"[1]", "line 1: a list, not an object"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_examples(path)


def test_a_repeated_id_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", ROW, ROW | {"id": "b"}, ROW)
    with pytest.raises(DataError, match=r"line 3, field 'id': 'a' is also the id of line 1"):
        read_examples(path)


def test_a_missing_file_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="searchrl data worldfacts"):
        read_examples(tmp_path / "none.jsonl")


def test_compressed_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(ROW) + "\n\n" + json.dumps(ROW | {"id": "b"})).encode()))
    assert [example.id for example in read_examples(path)] == ["a", "b"]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz is no intact gzip file"):
        read_examples(path)
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"x\.jsonl\.gz is no intact gzip file"):
        read_examples(path)


def test_text_that_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1, field 'question': half a surrogate pair at character 2"):
        read_examples(write(tmp_path / "x.jsonl", ROW | {"question": "ab\ud83d"}))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        read_examples(tmp_path)


# --- Parquet --------------------------------------------------------------------------------------------


def parquet(path: Path, *rows: dict[str, object]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def search_r1(number: int, **changes: object) -> dict[str, object]:
    """A row as Search-R1's scripts write it, without the columns that the source's own rows had."""
    return {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": f"Use <search> … </search>. Question: who is {number}?\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": [f"n{number}", "x"]}},
        "extra_info": {"split": "train", "index": 0},
    } | changes


@pytest.mark.parametrize("metadata", [{"hops": 2}, '{"hops": 2}'])
def test_parquet_in_our_form(tmp_path: Path, metadata: object) -> None:
    rows = [ROW | {"id": f"r{n}", "metadata": metadata, "other": n} for n in range(3000)]  # several batches
    examples = read_examples(parquet(tmp_path / "x.parquet", *rows))
    assert [example.id for example in examples] == [f"r{n}" for n in range(3000)]
    assert examples[2999] == Example(
        id="r2999", question="Who?", golden_answers=("Ann", "Anna"), data_source="set", metadata={"hops": 2}
    )


def test_parquet_without_metadata(tmp_path: Path) -> None:
    rows = [{key: value for key, value in ROW.items() if key != "metadata"}, ROW | {"id": "b"}]
    first, second = read_examples(parquet(tmp_path / "x.parquet", rows[0] | {"metadata": None}, rows[1]))
    assert (first.metadata, second.metadata) == ({}, {"hops": 2})
    assert read_examples(parquet(tmp_path / "x.parquet", rows[0]))[0].metadata == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "row 1, field 'id': expected a string, got None"),
        ({"question": ""}, "row 1, field 'question': empty"),
        ({"golden_answers": []}, "row 1, field 'golden_answers': expected a list with at least one"),
        ({"golden_answers": [None]}, "row 1, field 'golden_answers': expected a string, got None"),
        ({"id": "a"}, "row 1, field 'id': 'a' is also the id of row 0"),
    ],
)
def test_a_bad_parquet_value_names_row_and_field(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = parquet(tmp_path / "x.parquet", ROW, ROW | {"id": "b"} | change)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert f"{path}, {message}" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_metadata_as_text_must_be_an_object(tmp_path: Path, text: str) -> None:
    path = parquet(tmp_path / "x.parquet", ROW | {"metadata": text})
    with pytest.raises(DataError, match=r"row 0, field 'metadata': (not valid JSON|expected an object)"):
        read_examples(path)


def test_missing_columns_are_named_with_those_there(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"query": "Who?", "answer": "Ann", "id": "1"})
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(
        f"{path}: no column question, golden_answers, data_source; it has query, answer, id. "
    )


def test_a_file_that_is_no_parquet_or_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_text(json.dumps(ROW))
    with pytest.raises(DataError, match=r"x\.parquet is no intact Parquet file"):
        read_examples(path)
    content = bytearray(parquet(path, *(ROW | {"id": str(n)} for n in range(500))).read_bytes())
    content[4:400] = bytes(396)  # the first column's pages; the schema stands at the end
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet is damaged after row 0"):
        read_examples(path)
    pq.write_table(pa.Table.from_pylist([ROW])[:0], path)
    with pytest.raises(DataError, match="holds no rows"):
        read_examples(path)


# --- Search-R1's Parquet --------------------------------------------------------------------------------


def test_search_r1_rows_become_examples(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "train.parquet",
        search_r1(0),
        search_r1(1, data_source="hotpotqa"),
        search_r1(2, extra_info={"split": None, "index": None}),
    )
    examples = read_examples(path)
    assert examples[0] == Example(
        id="nq_train_0",
        question="who is 0?",
        golden_answers=("n0", "x"),
        data_source="nq",
        metadata={"split": "train", "index": 0},
    )
    # The index starts anew with each data set, the row's number does not.
    assert [example.id for example in examples] == ["nq_train_0", "hotpotqa_train_1", "nq_2"]
    assert examples[2].metadata == {}
    assert examples[0].prompt is None


def test_search_r1_rows_with_the_columns_of_their_source(tmp_path: Path) -> None:
    """Its scripts keep them: ids that start anew with each set, and metadata with paragraphs."""
    own = {"id": "train_0", "question": "own words?", "golden_answers": ["other"], "metadata": {"x": "y"}}
    first, second = read_examples(parquet(tmp_path / "x.parquet", search_r1(0) | own, search_r1(1) | own))
    assert (first.question, first.golden_answers) == ("own words?", ("n0", "x"))
    assert (first.id, second.id) == ("nq_train_0", "nq_train_1")
    assert first.metadata == {"split": "train", "index": 0}


@pytest.mark.parametrize(
    ("changes", "question", "golds"),
    [
        ({"reward_model": {"ground_truth": {"target": "one"}}}, "who is 0?", ("one",)),
        ({"reward_model": {"ground_truth": {"target": ["", "one"]}}}, "who is 0?", ("one",)),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": " Who? "}]},
            "Who?",
            None,
        ),
        ({"prompt": [{"role": "user", "content": "Question: a?\nQuestion: b?"}]}, "b?", None),
        ({"prompt": "Question: plain text?"}, "plain text?", None),
    ],
)
def test_search_r1_variants(
    tmp_path: Path, changes: dict[str, object], question: str, golds: tuple[str, ...] | None
) -> None:
    (example,) = read_examples(parquet(tmp_path / "x.parquet", search_r1(0, **changes)))
    assert (example.question, example.golden_answers) == (question, golds or ("n0", "x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_model": None}, "field 'reward_model': expected an object, got None"),
        ({"reward_model": {"style": "rule"}}, "field 'ground_truth': missing"),
        (
            {"reward_model": {"ground_truth": {"target": [""]}}},
            "field 'reward_model.ground_truth.target': expected a list with at least one string, got []",
        ),
        ({"data_source": None}, "field 'data_source': expected a string, got None"),
        ({"prompt": []}, "field 'prompt': expected text or a list of {role, content} messages, got []"),
        ({"prompt": [{"role": "user", "content": "Question: "}]}, "field 'question': empty"),
    ],
)
def test_a_bad_search_r1_value_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = parquet(tmp_path / "x.parquet", search_r1(0, **changes))
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert f"{path}, row 0, {message}" in str(caught.value)


# --- ready prompts --------------------------------------------------------------------------------------


def test_search_r1_prompts_are_ready(tmp_path: Path) -> None:
    (example,) = read_examples(parquet(tmp_path / "x.parquet", search_r1(0)), prompt_column="prompt")
    content = "Use <search> … </search>. Question: who is 0?\n"
    assert example.prompt == (Message(role="user", content=content),)
    assert example.question == "who is 0?"


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ("Who?\n", (Message(role="user", content="Who?\n"),)),
        (
            [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            (Message(role="system", content="s"), Message(role="user", content="u")),
        ),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_prompt_column_of_ones_own(
    tmp_path: Path, form: str, value: object, prompt: tuple[Message, ...]
) -> None:
    path = (write if form == "jsonl" else parquet)(tmp_path / f"x.{form}", ROW | {"chat": value})
    (example,) = read_examples(path, prompt_column="chat")
    assert example.prompt == prompt
    assert read_examples(path)[0].prompt is None


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_missing_prompt_column_is_named_with_those_there(tmp_path: Path, form: str) -> None:
    path = (write if form == "jsonl" else parquet)(tmp_path / f"x.{form}", ROW)
    with pytest.raises(DataError) as caught:
        read_examples(path, prompt_column="chat")
    assert "chat" in str(caught.value)
    assert "id, question, golden_answers, data_source, metadata" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "field 'chat': expected text or a list of {role, content} messages, got None"),
        ([], "field 'chat': expected text or a list"),
        (" ", "field 'chat': empty"),
        (
            ["Who?"],
            "field 'chat': expected a message with role (system, user, assistant) and content, got 'Who?'",
        ),
        ([{"role": "tool", "content": "x"}], "field 'chat': expected a message with role"),
        ([{"role": "user"}], "field 'chat.content': expected a string, got None"),
        ([{"role": "user", "content": ["x"]}], "field 'chat.content': expected a string, got ['x']"),
        ([{"role": "assistant", "content": "x"}], "field 'chat': the last message is the assistant's"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path: Path, value: object, message: str) -> None:
    path = write(tmp_path / "x.jsonl", ROW | {"chat": value})
    with pytest.raises(DataError) as caught:
        read_examples(path, prompt_column="chat")
    assert f"{path}, line 1, {message}" in str(caught.value)


# --- real questions -------------------------------------------------------------------------------------

REAL = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the folder of real questions beside the repository")
@pytest.mark.parametrize(
    ("name", "rows", "source"),
    [("nq_open_dev_half", 1800, "nq"), ("hotpotqa_dev_part", 3000, "hotpotqa")],
)
def test_real_questions_are_read_whole(name: str, rows: int, source: str) -> None:
    examples = read_examples(REAL / f"{name}.jsonl")
    assert len(examples) == len({example.id for example in examples}) == rows
    assert {example.data_source for example in examples} == {source}
    assert all(example.question.strip() and example.golden_answers for example in examples)


def test_the_first_of_each_source() -> None:
    examples = [
        Example(id=id_, question="Who?", golden_answers=("x",), data_source=source)
        for id_, source in ("an", "bn", "cp", "dn", "ep", "fp")
    ]
    assert [example.id for example in first_of_each_source(examples, 2)] == ["a", "b", "c", "e"]
    assert first_of_each_source(examples, 0) == examples
