from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from searchrl.retrieval.corpus import Corpus, CorpusError
from searchrl.retrieval.unpack import unpacked

LINES = b'{"id": "0", "contents": "x"}\n{"id": "1", "contents": "y"}\n'


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(LINES))
    return path


def test_it_is_unpacked_once(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = unpacked(packed)
    assert plain == packed.with_name("c.jsonl")
    assert plain.read_bytes() == LINES
    assert f"unpacking {packed} to {plain}, once" in capsys.readouterr().err
    written = plain.stat().st_mtime_ns
    assert unpacked(packed) == plain
    assert plain.stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""
    assert unpacked(plain) == plain
    assert Corpus(plain)[1].id == "1"


def test_several_members_are_one_file(packed: Path) -> None:
    packed.write_bytes(gzip.compress(LINES) + gzip.compress(LINES))
    assert unpacked(packed).read_bytes() == LINES + LINES


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_archive_leaves_nothing(packed: Path, damage: str) -> None:
    content = bytearray(packed.read_bytes())
    content[-6] ^= 1
    packed.write_bytes(content if damage == "flip" else content[:-9])
    with pytest.raises(CorpusError, match=r"is damaged .*: fetch it again"):
        unpacked(packed)
    assert [path.name for path in packed.parent.iterdir()] == ["c.jsonl.gz"]


def test_another_file_in_its_place_is_left_alone(packed: Path) -> None:
    plain = packed.with_name("c.jsonl")
    plain.write_bytes(b"mine")
    with pytest.raises(
        CorpusError, match=r"is not what this program unpacked from .*: remove one of the two"
    ):
        unpacked(packed)
    assert plain.read_bytes() == b"mine"
    plain.unlink()
    unpacked(packed)
    packed.write_bytes(gzip.compress(LINES * 2))
    os.utime(packed, ns=(0, 1))
    with pytest.raises(CorpusError, match="remove one of the two"):
        unpacked(packed)


def test_what_cannot_be_unpacked(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no corpus at"):
        unpacked(tmp_path / "missing.jsonl.gz")
    (tmp_path / "c.jsonl").write_bytes(gzip.compress(LINES))
    with pytest.raises(CorpusError, match=r"rename it to c\.jsonl\.gz"):
        unpacked(tmp_path / "c.jsonl")
