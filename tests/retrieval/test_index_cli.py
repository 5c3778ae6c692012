from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from searchrl.retrieval.build import build_index
from searchrl.retrieval.corpus import Corpus
from searchrl.retrieval.index_cli import main
from searchrl.retrieval.index_evaluate import read_queries, sample_queries
from searchrl.retrieval.manifest import BuildError, read_manifest


def test_kinds_are_listed_with_their_computed_costs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["kinds"])
    text = capsys.readouterr().out
    assert "computed for 21,015,324 vectors of 768 numbers" in text
    (line,) = (line for line in text.splitlines() if "pq_fastscan+fp16" in line)
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "pq_fastscan+fp16",
        "PQ192x4fs",
        "96",
        "2.02",
        "32.28",
        "2.22",
        "65,536",
        "candidates=64",
    ]
    main(["kinds", "--rows", "1000000", "--dim", "384"])
    assert "1,000,000 vectors of 384 numbers" in capsys.readouterr().out


def test_a_packed_corpus_is_built_and_converted(
    tmp_path: Path, corpus_path: Path, encoder_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus_path.read_bytes()))
    resolved: list[str] = []

    def resolve(name: str) -> Path:
        resolved.append(name)
        return encoder_path

    build = ["build", "--corpus", str(packed), "--out", str(tmp_path / "i"), "--kind", "hybrid"]
    main([*build, "--encoder", "intfloat/e5", "--dense-index", "flat"], resolve_encoder=resolve)
    assert resolved == ["intfloat/e5"]
    manifest = read_manifest(tmp_path / "i")
    assert manifest.corpus_sha256 == Corpus(corpus_path).sha256
    assert manifest.encoder is not None
    assert manifest.encoder.family == "e5"
    assert f"{tmp_path / 'i'}: 50 passages, fingerprint {manifest.fingerprint}" in capsys.readouterr().out
    main(["convert", "--index", str(tmp_path / "i"), "--out", str(tmp_path / "j"), "--dense-index", "sq8"])
    assert read_manifest(tmp_path / "j").corpus_sha256 == manifest.corpus_sha256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--corpus", "c", "--out", "i"], "--encoder is needed for --kind dense and hybrid"),
        (["build", "--corpus", "c", "--out", "i", "--kind", "bm25", "--encoder", "e"], "and only for these"),
        (["evaluate", "--index", "i"], "--corpus is needed to build the index, and to take queries from"),
        (["evaluate", "--index", "i", "--corpus", "c"], "there is no index at i; give --encoder to build it"),
        (["import", "--parts", "p", "--out", "i", "--corpus", "c"], "required: --encoder"),
        ([], "COMMAND"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_is_light() -> None:
    program = (
        "import sys; from searchrl.retrieval.index_cli import main\n"
        "try: main(['--help'])\n"
        "finally: print('loaded:', *(n for n in ('numpy.random', 'torch', 'faiss') if n in sys.modules))"
    )
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].strip().removesuffix(" numpy.random") == "loaded:"


def test_queries_from_passages_and_from_a_file(tmp_path: Path, corpus_path: Path) -> None:
    sampled = sample_queries(Corpus(corpus_path), 200)
    assert len(sampled) == 50
    assert sampled == sample_queries(Corpus(corpus_path), 200)
    assert "France is a country in western Europe." in sampled, "the first sentence, without the title"
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "who?"}\n{"question": "where?", "id": 1}\n')
    assert read_queries(path) == ["who?", "where?"]
    path.write_text('{"question": "who?"}\n{"query": "where?"}\n')
    with pytest.raises(BuildError, match='line 2: needs a JSON object with a "question"'):
        read_queries(path)
    path.write_text("")
    with pytest.raises(BuildError, match="has no questions"):
        read_queries(path)


@pytest.mark.integration
def test_evaluate_prints_a_table(
    tmp_path: Path, encoder_path: Path, contents: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "c.jsonl"
    texts = [f"{a}\n{b}" for a in contents[:20] for b in contents[:20]]
    corpus.write_text(
        "".join(json.dumps({"id": str(i), "contents": text}) + "\n" for i, text in enumerate(texts))
    )
    command = ["evaluate", "--index", str(tmp_path / "i"), "--corpus", str(corpus), "--queries", "40"]
    main([*command, "--encoder", str(encoder_path), "--kinds", "flat,sq4", "IVF4,Flat", "pq_fastscan+fp16"])
    output = capsys.readouterr()
    assert "40 queries, one thread, without encoding" in output.out
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.out.splitlines()
        if line.startswith("│")
    ]
    table = {row[0]: row[1:] for row in cells}
    assert list(table) == ["flat", "sq4", "IVF4,Flat", "pq_fastscan+fp16"]
    assert table["flat"][0] == "1.0000"
    assert float(table["sq4"][0]) < 1.0
    assert float(table["pq_fastscan+fp16"][0]) > 0.9
    assert float(table["sq4"][1]) < float(table["flat"][1]) / 2, "MB on the disk"
    assert all(float(figure) > 0 for row in table.values() for figure in row[5:])
    assert "flat: recall@3 1.0000" in output.err
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["i"]


def test_build_index_is_the_same_by_another_door(tmp_path: Path, corpus_path: Path) -> None:
    main(["build", "--corpus", str(corpus_path), "--out", str(tmp_path / "cli"), "--kind", "bm25"])
    from searchrl.config import IndexKind

    own = build_index(corpus_path, tmp_path / "own", kind=IndexKind.bm25)
    assert own.fingerprint == read_manifest(tmp_path / "cli").fingerprint
