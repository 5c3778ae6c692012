from __future__ import annotations

import json
from pathlib import Path

import pytest

from searchrl.data import DataError, read_examples
from searchrl.trajectory import Example

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
