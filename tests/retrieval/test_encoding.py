"""Real builds in real processes: killed, resumed, split over workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from searchrl.config import IndexKind
from searchrl.retrieval.build import build_index
from searchrl.retrieval.corpus import Corpus, CorpusError
from searchrl.retrieval.dense_build import require_space
from searchrl.retrieval.encoder import Encoder, EncoderFamily, TextKind
from searchrl.retrieval.encoding import SHARD_ROWS
from searchrl.retrieval.flatfile import RowStore
from searchrl.retrieval.manifest import BuildError, Manifest
from searchrl.retrieval.workspace import workspace

ROWS = 3 * SHARD_ROWS + 7


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, contents: list[str]) -> Path:
    """Four shards of texts of several lengths."""
    path = tmp_path_factory.mktemp("large") / "c.jsonl"
    with path.open("w") as file:
        for row in range(ROWS):
            text = f"{contents[row % 50]} {contents[row // 50 % 50] * (row % 3)}"
            file.write(json.dumps({"id": str(row), "contents": text}) + "\n")
    return path


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, large: Path, encoder_path: Path) -> Manifest:
    """An index built in one go by one process."""
    return build(large, tmp_path_factory.mktemp("straight") / "i", encoder_path)


def build(corpus: Path, directory: Path, encoder: Path, *, processes: int = 1) -> Manifest:
    return build_index(
        corpus, directory, kind=IndexKind.dense, encoder_path=encoder, processes=processes, progress=False
    )


def start(corpus: Path, directory: Path, encoder: Path, *, processes: int = 1) -> subprocess.Popen[str]:
    program = "import sys; from searchrl.retrieval.index_cli import main; main(sys.argv[1:])"
    command = ["build", "--corpus", str(corpus), "--out", str(directory), "--encoder", str(encoder)]
    options = ["--encoder-family", "minilm", "--processes", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *command, *options],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def leave(directory: Path, key: Mapping[str, object], files: dict[str, str]) -> Path:
    """The workspace of a build that failed after it had written ``files``."""
    with contextlib.suppress(KeyboardInterrupt), workspace(directory, key) as work:
        for name, text in files.items():
            (work / name).write_text(text)
        raise KeyboardInterrupt
    return directory.with_name(f".{directory.name}.partial")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)


def finished(directory: Path) -> int:
    shards = directory.with_name(f".{directory.name}.partial") / "vectors.shards"
    return len(shards.read_text().splitlines()) if shards.exists() else 0


@pytest.mark.integration
def test_a_killed_build_goes_on(
    tmp_path: Path, large: Path, encoder_path: Path, straight: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(large, tmp_path / "i", encoder_path)
    wait_for(lambda: finished(tmp_path / "i") >= 1, process)
    process.kill()
    process.communicate()
    done = finished(tmp_path / "i")
    assert 1 <= done < 4
    assert not (tmp_path / "i").exists()
    resumed = build(large, tmp_path / "i", encoder_path)
    assert f"going on after {done * SHARD_ROWS:,} passages" in capsys.readouterr().err
    assert resumed.fingerprint == straight.fingerprint
    assert resumed.files == straight.files
    assert [path.name for path in tmp_path.iterdir()] == ["i"]


@pytest.mark.integration
def test_processes_and_a_killed_worker_change_nothing(
    tmp_path: Path, large: Path, encoder_path: Path, straight: Manifest
) -> None:
    process = start(large, tmp_path / "i", encoder_path, processes=2)
    wait_for(lambda: finished(tmp_path / "i") >= 1, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker on cpu was killed by SIGKILL, often a sign of too little memory" in errors
    assert "of 4 shards are finished and kept: run the same command again to go on" in errors
    assert not Path(f"/proc/{workers[1]}").exists(), "the other worker is gone too"
    assert finished(tmp_path / "i") >= 1
    resumed = build(large, tmp_path / "i", encoder_path, processes=2)
    assert resumed.files == straight.files, "byte for byte"


@pytest.mark.integration
def test_a_worker_that_fails_tells_why(tmp_path: Path, corpus_path: Path, encoder_path: Path) -> None:
    with pytest.raises(BuildError, match=r"(?s)a worker on cuda:99 failed; 0 of 1 shards .* CUDA"):
        build_index(
            corpus_path, tmp_path / "i", kind=IndexKind.dense, encoder_path=encoder_path, devices=["cuda:99"]
        )
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_malformed_line_is_found_before_anything_is_encoded(
    tmp_path: Path, encoder_path: Path, contents: list[str]
) -> None:
    lines = [json.dumps({"id": str(row), "contents": contents[row % 50]}) for row in range(2 * SHARD_ROWS)]
    lines[SHARD_ROWS + 5] = '{"id": "x"}'
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    with pytest.raises(CorpusError, match=f"line {SHARD_ROWS + 6}: needs the strings"):
        build(tmp_path / "c.jsonl", tmp_path / "i", encoder_path, processes=2)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_vectors_are_those_of_the_encoder(
    tmp_path: Path, corpus_path: Path, encoder_path: Path, contents: list[str]
) -> None:
    build(corpus_path, tmp_path / "i", encoder_path)
    expected = Encoder(encoder_path, EncoderFamily.MINILM, threads=2).encode(contents, TextKind.PASSAGE)
    store = RowStore(tmp_path / "i/dense.faiss")
    assert (store.vectors(slice(None)) == expected).all()


def test_what_another_build_left_is_discarded(
    tmp_path: Path, corpus_path: Path, encoder_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = leave(tmp_path / "i", {"corpus": "another"}, {"vectors.shards": "0\n", "vectors.faiss": "wrong"})
    manifest = build(corpus_path, tmp_path / "i", encoder_path)
    assert f"discarding what another build left in {work}" in capsys.readouterr().err
    assert manifest.fingerprint == build(corpus_path, tmp_path / "j", encoder_path).fingerprint
    assert not work.exists()


def test_a_torn_note_of_a_shard_does_not_count(
    tmp_path: Path, corpus_path: Path, encoder_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build(corpus_path, tmp_path / "i", encoder_path)
    from searchrl.retrieval.manifest import identity

    key = {"corpus": Corpus(corpus_path).sha256, "encoder": identity(first.encoder)}
    leave(tmp_path / "j", key, {"vectors.shards": "0"})  # and no newline
    assert build(corpus_path, tmp_path / "j", encoder_path).files == first.files
    assert "going on" not in capsys.readouterr().err


def test_two_builds_of_one_index_do_not_mix(tmp_path: Path, corpus_path: Path) -> None:
    with (
        workspace(tmp_path / "i", {}) as work,
        pytest.raises(BuildError, match=r"another process is making .*/i: wait for it, or end it"),
    ):
        build_index(corpus_path, tmp_path / "i", kind=IndexKind.bm25)
    assert not work.exists()


def test_a_full_disk_is_foreseen(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"encoding needs 1000000000\.0 GB in .*, which has [\d.]+ GB left"):
        require_space(tmp_path, 10**18, "encoding")
