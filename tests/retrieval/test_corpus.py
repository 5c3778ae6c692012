from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchrl.retrieval.corpus import Corpus, CorpusError


def test_every_row_is_found(corpus_path: Path, contents: list[str]) -> None:
    corpus = Corpus(corpus_path)
    assert len(corpus) == len(contents) == 50
    assert [corpus[row].contents for row in range(50)] == contents
    assert corpus[49].id == "d49"
    assert json.loads(corpus.raw(49)) == {"id": "d49", "contents": contents[49]}


@settings(max_examples=30)
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), min_size=1), newline=st.booleans())
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str], newline: bool) -> None:
    path = tmp_path_factory.mktemp("any") / "c.jsonl"
    lines = [json.dumps({"id": str(i), "contents": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    path.write_bytes(("\n".join(lines) + "\n" * newline).encode())
    corpus = Corpus(path)
    assert [tuple(corpus[row]) for row in range(len(corpus))] == [(str(i), t) for i, t in enumerate(texts)]


def test_the_offsets_are_kept_and_remade_when_the_corpus_changes(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "a", "contents": "one"}\n')
    first = Corpus(path)
    side = path.with_name("c.jsonl.offsets.npy")
    assert np.load(side).tolist() == [0, 31]
    written = side.stat().st_mtime_ns
    assert Corpus(path).sha256 == first.sha256
    assert side.stat().st_mtime_ns == written

    before = path.stat()
    path.write_text('{"id": "b", "contents": "two"}\n')  # the same size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    second = Corpus(path)
    assert second[0].id == "b"
    assert second.sha256 != first.sha256


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "\\udc00", "contents": "a\\ud800b"}\n')
    assert Corpus(path)[0] == ("\ufffd", "a\ufffdb")


@pytest.mark.parametrize("damage", [b"", b"garbage", b"[" * 100_000])
def test_a_torn_side_file_is_remade(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "a", "contents": "one"}\n{"id": "b", "contents": "two"}\n')
    Corpus(path)
    for suffix in (".offsets.npy", ".offsets.json"):
        path.with_name(path.name + suffix).write_bytes(damage)
        assert [Corpus(path)[row].id for row in range(2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "1"', "line 2: not a JSON object in UTF-8"),
        (b'{"id": "1", "contents": "\xff"}', "line 2: not a JSON object in UTF-8"),
        (b"[" * 100_000, "line 2: not a JSON object in UTF-8"),
        (b"[1]", "line 2: expected a JSON object, found list"),
        (b'{"id": "1", "text": "x"}', r"line 2: needs the strings .* has the keys \['id', 'text'\]"),
        (b'{"id": true, "contents": "x"}', "line 2: needs the strings"),
        (b"", "line 2: blank line"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"id": "0", "contents": "x"}\n' + line + b'\n{"id": "2", "contents": "x"}\n')
    with pytest.raises(CorpusError, match=reason):
        Corpus(path)[1]


def test_files_that_cannot_be_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no corpus at"):
        Corpus(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(CorpusError, match="is empty"):
        Corpus(tmp_path / "empty.jsonl")
    (tmp_path / "c.jsonl").write_bytes(gzip.compress(b'{"id": "0", "contents": "x"}\n'))
    with pytest.raises(CorpusError, match="gunzip it first"):
        Corpus(tmp_path / "c.jsonl")


def test_a_row_outside_is_an_index_error(corpus_path: Path) -> None:
    corpus = Corpus(corpus_path)
    for row in (-1, 50):
        with pytest.raises(IndexError, match="50 passages"):
            corpus.raw(row)


@pytest.mark.integration
def test_a_large_corpus_opens_at_once_and_stays_on_the_disk(tmp_path: Path) -> None:
    """3 million lines: offsets of 24 MB. Opening again reads the side files' few bytes."""
    path = tmp_path / "c.jsonl"
    with path.open("w") as file:
        for start in range(0, 3_000_000, 100_000):
            file.writelines(f'{{"id": "{i}", "contents": "x"}}\n' for i in range(start, start + 100_000))
    program = (
        "import re, sys, time; from pathlib import Path; from searchrl.retrieval.corpus import Corpus\n"
        "def anonymous():\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', status)[1]) / 1024\n"
        "before, started = anonymous(), time.monotonic()\n"
        "corpus = Corpus(sys.argv[1])\n"
        "seconds = time.monotonic() - started\n"
        "assert all(corpus[row].id == str(row) for row in range(0, len(corpus), 1000))\n"
        "print(len(corpus), seconds, anonymous() - before)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    scanned = math.inf
    for first in (True, False):
        command = [sys.executable, "-c", program, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows, seconds, megabytes = map(float, done.stdout.split())
        assert rows == 3_000_000
        # The first start keeps some of what its scan allocated; the offsets themselves are no part of it.
        assert megabytes < (20 if first else 3)
        assert seconds < scanned / 2
        scanned = seconds
