"""Published sets as rows of ours: from a local copy, from the hub's cache, and from a server like the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow.parquet as pq
import pytest

from searchrl.console import Console
from searchrl.data import DataError, read_examples
from searchrl.data.data_cli import main
from searchrl.data.files import replacing, sha256
from searchrl.data.flashrag import DEFAULT_SOURCES, REPOSITORY, SOURCES, hops, to_row
from searchrl.data.prepare import PreparedManifest, prepare

SOURCE_TREE = Path(__file__).parents[2] / "src"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

CONTEXT = {"title": ["A"], "sentences": [["Long."]]}
FACTS = {"title": ["A", "B"], "sent_id": [0, 1]}
STEP = {
    "id": 1,
    "question": "x >> y",
    "answer": "z",
    "support_paragraph": {"idx": 3, "title": "Z", "paragraph_text": "Long.", "is_supporting": True},
}
TEST_ROWS: dict[str, list[dict[str, Any]]] = {
    "nq/test": [
        {"id": "test_0", "question": "who was  first ", "golden_answers": ["Röntgen", "W. Röntgen"]},
        {"id": "test_1", "question": "who was second?", "golden_answers": ["Lorentz", " "]},
    ],
    "triviaqa/test": [{"id": "test_0", "question": "Which?!", "golden_answers": ["x"]}],
    "popqa/test": [
        {"id": "test_0", "question": "q?", "golden_answers": ["x"], "metadata": {"prop": "p", "s_pop": 7}}
    ],
    "hotpotqa/dev": [
        {
            "id": "dev_0",
            "question": "Are both the same?",
            "golden_answers": ["yes"],
            "metadata": {
                "type": "comparison",
                "level": "hard",
                "supporting_facts": FACTS,
                "context": CONTEXT,
            },
        }
    ],
    "2wikimultihopqa/dev": [
        {"id": "dev_0", "question": "a?", "golden_answers": ["x"], "metadata": {"type": "compositional"}},
        {"id": "dev_1", "question": "b?", "golden_answers": ["x"], "metadata": {"type": "bridge_comparison"}},
    ],
    "musique/dev": [
        {
            "id": "3hop1__9_8_7",
            "question": "a?",
            "golden_answers": ["x"],
            "metadata": {"answerable": True, "question_decomposition": [STEP, STEP, STEP]},
        },
        {"id": "dev_1", "question": "b?", "golden_answers": ["x"], "metadata": {}},
    ],
    "bamboogle/test": [{"id": "test_0", "question": "q?", "golden_answers": ["x"]}],
}


def write(folder: Path, rows_of: dict[str, list[dict[str, Any]]]) -> Path:
    for name, rows in rows_of.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def training(count: int = 40) -> dict[str, list[dict[str, Any]]]:
    return {
        f"{source}/train": [
            {"id": f"train_{n}", "question": f"{source} {n}", "golden_answers": [str(n)]}
            for n in range(count)
        ]
        for source in ("nq", "hotpotqa")
    }


def run(split: str, out: Path, origin: Path | str, **options: Any) -> PreparedManifest:
    sources = options.pop("sources", DEFAULT_SOURCES[split])
    return prepare(split, sources, out, origin=str(origin), console=Console(enabled=True), **options)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- rows -----------------------------------------------------------------------------------------------


def test_the_seven_test_sets_keep_every_row_and_their_order(tmp_path: Path) -> None:
    manifest = run("test", tmp_path / "out", write(tmp_path, TEST_ROWS))
    written = rows(tmp_path / "out" / "test.jsonl")
    assert [row["id"] for row in written] == [
        "nq_test_0",
        "nq_test_1",
        "triviaqa_test_0",
        "popqa_test_0",
        "hotpotqa_dev_0",
        "2wikimultihopqa_dev_0",
        "2wikimultihopqa_dev_1",
        "musique_dev_0",
        "musique_dev_1",
        "bamboogle_test_0",
    ]
    assert [row["metadata"].get("hops") for row in written] == [1, 1, 1, 1, 2, 2, 4, 3, None, 2]
    assert [row["question"] for row in written][:3] == ["who was  first?", "who was second?", "Which?!?"]
    assert written[0]["golden_answers"] == ["Röntgen", "W. Röntgen"]
    assert written[1]["golden_answers"] == ["Lorentz"]
    assert [file.blank_answers for file in manifest.sources] == [1, 0, 0, 0, 0, 0, 0]
    assert (manifest.seed, manifest.rows) == (None, 10)


def test_metadata_is_kept_but_for_paragraphs(tmp_path: Path) -> None:
    run("test", tmp_path / "out", write(tmp_path, TEST_ROWS), sources=("popqa", "hotpotqa", "musique"))
    popqa, hotpotqa, musique, _ = (row["metadata"] for row in rows(tmp_path / "out" / "test.jsonl"))
    assert popqa == {"hops": 1, "prop": "p", "s_pop": 7}
    assert hotpotqa == {"hops": 2, "type": "comparison", "level": "hard", "supporting_facts": FACTS}
    assert musique["source_id"] == "3hop1__9_8_7"
    assert musique["question_decomposition"][0]["support_paragraph"] == {
        "idx": 3,
        "title": "Z",
        "is_supporting": True,
    }


@pytest.mark.parametrize(
    ("source", "id", "metadata", "expected"),
    [
        ("nq", "dev_0", {}, 1),
        ("bamboogle", "test_0", {}, 2),
        ("2wikimultihopqa", "dev_0", {}, 2),
        ("musique", "2hop__1_2", {}, 2),
        ("musique", "4hop3__1_2", {"question_decomposition": []}, 4),
        ("musique", "dev_0", {"question_decomposition": [{}, {}]}, 2),
        ("musique", "dev_0", {}, None),
    ],
)
def test_hops(source: str, id: str, metadata: dict[str, object], expected: int | None) -> None:
    assert hops(source, id, metadata) == expected


def test_what_a_row_says_of_its_hops_counts() -> None:
    row, _ = to_row("nq", "train", 0, {"question": "q", "golden_answers": "a", "metadata": {"hops": 3}}, "x")
    assert row["metadata"] == {"hops": 3}
    assert row["golden_answers"] == ["a"]


def test_training_rows_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    write(tmp_path, training())
    orders = {}
    for seed in (0, 1):
        run("train", tmp_path / f"{seed}", tmp_path, seed=seed)
        orders[seed] = [row["id"] for row in rows(tmp_path / f"{seed}" / "train.jsonl")]
    in_order = [f"{source}_train_{n}" for source in ("nq", "hotpotqa") for n in range(40)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(in_order)
    assert len({tuple(order) for order in (*orders.values(), in_order)}) == 3
    # The order outlives versions of numpy: what these are today they must stay.
    assert orders[0][:3] == ["nq_train_11", "nq_train_3", "nq_train_20"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_both_forms_are_read_alike(tmp_path: Path, form: str) -> None:
    manifest = run("test", tmp_path / "out", write(tmp_path, TEST_ROWS), form=form)
    examples = read_examples(tmp_path / "out" / f"test.{form}")
    assert manifest.output == f"test.{form}"
    assert [example.hops for example in examples] == [1, 1, 1, 1, 2, 2, 4, 3, 0, 2]
    assert examples[0].golden_answers == ("Röntgen", "W. Röntgen")
    assert examples[4].metadata["supporting_facts"] == FACTS


def test_metadata_in_parquet_is_text_of_one_type(tmp_path: Path) -> None:
    run("test", tmp_path, write(tmp_path, TEST_ROWS), form="parquet")
    assert [str(kind) for kind in pq.read_schema(tmp_path / "test.parquet").types] == [
        "string",
        "string",
        "list<element: string>",
        "string",
        "string",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "test_1"', "line 2: not valid JSON"),
        (
            '{"id": "test_1", "golden_answers": ["a"]}',
            "line 2, field 'question': missing; the row has id, gold",
        ),
        ('{"question": " ", "golden_answers": ["a"]}', "line 2, field 'question': empty"),
        (
            '{"question": "q", "golden_answers": [""]}',
            "line 2, field 'golden_answers': expected a list with at",
        ),
        (
            '{"question": "q", "golden_answers": [1]}',
            "line 2, field 'golden_answers': expected a string, got 1",
        ),
        (
            '{"question": "q", "golden_answers": ["\\ud83d"]}',
            "line 2, field 'golden_answers': half a surrogate",
        ),
        (
            '{"question": "q", "golden_answers": ["a"], "metadata": [1]}',
            "line 2, field 'metadata': expected an",
        ),
        (
            '{"question": "q", "golden_answers": ["a"], "metadata": {"x": "\\ud83d"}}',
            "nq_test_1: its metadata holds half a surrogate pair",
        ),
    ],
)
def test_a_bad_row_is_named_and_leaves_nothing_behind(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, {"nq/test": TEST_ROWS["nq/test"][:1]})
    with (tmp_path / "nq" / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError) as caught:
        run("test", tmp_path / "out", tmp_path, sources=("nq",))
    assert message in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


# --- what is there --------------------------------------------------------------------------------------


def test_the_manifest_holds_what_was_read_and_written(tmp_path: Path) -> None:
    manifest = run("train", tmp_path / "out", write(tmp_path, training(2)), sources=("hotpotqa",), seed=5)
    saved = json.loads((tmp_path / "out" / "train.manifest.json").read_text(encoding="utf-8"))
    assert saved == {
        "format": 1,
        "split": "train",
        "form": "jsonl",
        "seed": 5,
        "sources": [
            {
                "source": "hotpotqa",
                "file": "hotpotqa/train.jsonl",
                "sha256": sha256(tmp_path / "hotpotqa" / "train.jsonl"),
                "rows": 2,
                "published_rows": 90_447,
                "blank_answers": 0,
            }
        ],
        "output": "train.jsonl",
        "rows": 2,
        "sha256": sha256(tmp_path / "out" / "train.jsonl"),
    }
    assert manifest.sha256 == saved["sha256"]


def test_what_is_complete_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, training())
    first = run("train", tmp_path / "out", tmp_path)
    before = (tmp_path / "out" / "train.jsonl").stat()
    capsys.readouterr()
    assert run("train", tmp_path / "out", tmp_path) == first
    after = (tmp_path / "out" / "train.jsonl").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert "train.jsonl is complete: kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("seed", "the last one had format jsonl and seed 0"),
        ("form", "the last one had format jsonl and seed 0"),
        ("sources", "the last one had nq, hotpotqa"),
        ("input", "nq/train.jsonl changed"),
        ("output", "it is missing or not what its manifest says"),
        ("missing", "it is missing or not what its manifest says"),
        ("version", "its manifest is of another version"),
    ],
)
def test_what_is_not_what_was_asked_for_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, reason: str
) -> None:
    write(tmp_path, training())
    output, manifest = tmp_path / "out" / "train.jsonl", tmp_path / "out" / "train.manifest.json"
    run("train", tmp_path / "out", tmp_path)
    options: dict[str, Any] = {}
    if change in ("seed", "form", "sources"):
        options = {change: {"seed": 1, "form": "parquet", "sources": ("nq",)}[change]}
    elif change == "input":
        write(tmp_path, {"nq/train": training(41)["nq/train"]})
    elif change == "version":
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 0'))
    else:
        output.write_text("{}\n")
        if change == "missing":
            output.unlink()
    capsys.readouterr()
    made = run("train", tmp_path / "out", tmp_path, **options)
    assert f"is made anew: {reason}" in " ".join(capsys.readouterr().out.split())
    assert sha256(tmp_path / "out" / made.output) == made.sha256
    assert len(read_examples(tmp_path / "out" / made.output)) == made.rows


def test_an_unreadable_manifest_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, training())
    first = run("train", tmp_path, tmp_path)
    (tmp_path / "train.manifest.json").write_text("{}")
    assert run("train", tmp_path, tmp_path) == first
    assert run("train", tmp_path, tmp_path) == first


def test_somebody_elses_file_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path, training())
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(DataError, match="is in the way and was not prepared here"):
        run("train", tmp_path, tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_what_fails_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as fresh:
            fresh.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


# --- sizes ----------------------------------------------------------------------------------------------


def test_the_published_sizes() -> None:
    """PROTOCOL section 3."""
    assert sum(SOURCES[source].train for source in DEFAULT_SOURCES["train"]) == 169_615
    assert {name: (known.tested_on, known.test) for name, known in SOURCES.items()} == {
        "nq": ("test", 3_610),
        "triviaqa": ("test", 11_313),
        "popqa": ("test", 14_267),
        "hotpotqa": ("dev", 7_405),
        "2wikimultihopqa": ("dev", 12_576),
        "musique": ("dev", 2_417),
        "bamboogle": ("test", 125),
    }
    assert sum(known.test for known in SOURCES.values()) == 51_713


def test_a_whole_set_is_not_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = [{"question": str(n), "golden_answers": ["a"]} for n in range(125)]
    write(tmp_path, {"bamboogle/test": whole, "nq/test": TEST_ROWS["nq/test"]})
    run("test", tmp_path, tmp_path, sources=("bamboogle", "nq"))
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: nq/test.jsonl has 2 rows, published are 3,610" in said
    assert "warning: bamboogle" not in said


# --- requests that cannot be met ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sources", "squad"], "no source is called 'squad'; there are nq, triviaqa, popqa, hotpotqa"),
        (["--sources", "popqa"], "popqa has no training questions; choose from nq, triviaqa, hotpotqa"),
        (["--sources", "nq,nq"], "--sources 'nq,nq' must name at least one set, and each once"),
        (["--sources", ","], "must name at least one set"),
        (["--seed", "-1"], "seed -1 is negative"),
        (["--from", "nowhere"], "nowhere/nq/train.jsonl does not exist; --from names a folder laid out like"),
        (["--out", "file"], "--out file cannot be a folder"),
    ],
)
def test_a_request_that_cannot_be_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError) as caught:
        main(["prepare", "--split", "train", "--out", "out", *arguments])
    assert message in str(caught.value)


# --- the hub --------------------------------------------------------------------------------------------


def fill_cache(cache: Path, rows_of: dict[str, list[dict[str, Any]]]) -> None:
    """Files as ``huggingface_hub`` keeps them."""
    folder = cache / f"datasets--{REPOSITORY.replace('/', '--')}"
    write(folder / "snapshots" / COMMIT, rows_of)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def test_what_the_hubs_cache_has_needs_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    fill_cache(tmp_path / "cache", training(3))
    main(["prepare", "--split", "train", "--out", str(tmp_path / "out")])
    assert len(rows(tmp_path / "out" / "train.jsonl")) == 6


def test_without_hub_and_cache_the_way_around_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError) as caught:
        main(["prepare", "--split", "train", "--out", str(tmp_path / "out")])
    assert f"nq/train.jsonl of {REPOSITORY} cannot be downloaded (LocalEntryNotFoundError" in str(
        caught.value
    )
    assert "copy its files by another way, this one to DIR/nq/train.jsonl, and add --from DIR" in str(
        caught.value
    )


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A server that answers for files of the data set's repository as the hub does; and what was asked."""
    asked: list[str] = []
    root = f"/datasets/{REPOSITORY}/resolve/main/"

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(f"{self.command} {self.path}")
            file = folder / self.path.removeprefix(root)
            if not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("ETag", f'"{sha256(file)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(file.stat().st_size))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(file.read_bytes())

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.integration
def test_files_are_downloaded_once_from_a_server_like_the_hub(tmp_path: Path) -> None:
    write(tmp_path, training(3))
    settings = {
        "PYTHONPATH": str(SOURCE_TREE),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def call(endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "searchrl.cli", "data", "prepare", *arguments, "--out", tmp_path / "out"],
            env=os.environ | settings | {"HF_ENDPOINT": endpoint},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    with hub(tmp_path) as (endpoint, asked):
        first = call(endpoint, "--split", "train")
        assert first.returncode == 0, first.stderr
        assert len(rows(tmp_path / "out" / "train.jsonl")) == 6
        second = call(endpoint, "--split", "train", "--seed", "1")
        assert second.returncode == 0, second.stderr
        root = f"/datasets/{REPOSITORY}/resolve/main"
        assert sorted(line for line in asked if line.startswith("GET")) == [
            f"GET {root}/hotpotqa/train.jsonl",
            f"GET {root}/nq/train.jsonl",
        ]
        missing = call(endpoint, "--split", "test")
        assert missing.returncode == 2
        assert "nq/test.jsonl of" in missing.stderr
        assert "EntryNotFoundError" in missing.stderr
        assert "add --from DIR" in missing.stderr
        assert "Traceback" not in missing.stderr
    kept = call(endpoint, "--split", "train", "--seed", "1")  # the server is gone
    assert kept.returncode == 0, kept.stderr
    assert "is complete: kept" in kept.stdout
