"""From nothing to the benchmark table by the commands of README and docs, on small data of the same form.

What is smaller: question sets, corpus and encoder, the policy, the number of GPUs. Names are those of the
published experiment: a folder of the name takes the place of a model of the hub.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from builders import make_encoder
from example import ROOT
from integration.launch import python, run

pytestmark = pytest.mark.integration

TESTED_ON = {
    "nq": "test",
    "triviaqa": "test",
    "popqa": "test",
    "hotpotqa": "dev",
    "2wikimultihopqa": "dev",
    "musique": "dev",
    "bamboogle": "test",
}
RIVERS = {"Paris": "Seine", "Berlin": "Spree", "Rome": "Tiber", "Lisbon": "Tagus"}
SMALL = (
    "device=cpu",
    "model.dtype=float32",
    "steps=1",
    "groups_per_step=2",
    "group_size=2",
    "episode={max_turn_tokens: 24, max_observation_tokens: 64, max_context_tokens: 1024}",
    "engine={max_num_seqs: 8, kv_cache_gib: 0.125}",
    "sync.probe_max_abs_diff=1e-3",
    "eval={every: 0, questions: 1}",
    "saving.every=0",
)


def command(document: str, start: str) -> list[str]:
    """The arguments of a document's ``searchrl`` command that begins so."""
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.search(rf"^    searchrl +({re.escape(start)}.*?)(  #.*)?$", text, re.M)
    assert found is not None, start
    return shlex.split(found[1])


@pytest.fixture(scope="module")
def workspace(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub would give: question sets, corpus, two parts of its index, encoder and policy."""
    folder = tmp_path_factory.mktemp("published")
    passages = [f'"{city}"\n{city} lies on the {river}.' for city, river in RIVERS.items()]
    make_encoder(folder / "intfloat" / "e5-base-v2", passages, seed=0)
    (folder / "Qwen").mkdir()
    shutil.copytree(tiny_model, folder / "Qwen" / "Qwen2.5-3B")
    rows = [
        {"id": f"x_{n}", "question": f"on which river is {city}", "golden_answers": [river]}
        for n, (city, river) in enumerate(RIVERS.items())
    ]
    for source, split in [*TESTED_ON.items(), ("nq", "train"), ("hotpotqa", "train")]:
        file = folder / "flashrag" / source / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    wiki = folder / "assets" / "wiki-18"
    wiki.mkdir(parents=True)
    corpus = "".join(json.dumps({"id": str(n), "contents": p}) + "\n" for n, p in enumerate(passages))
    (wiki / "wiki-18.jsonl.gz").write_bytes(gzip.compress(corpus.encode()))
    (folder / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    encoder = ("--encoder", "intfloat/e5-base-v2", "--encoder-family", "e5")
    searchrl(folder, "index", "build", "--corpus", "corpus.jsonl", "--out", "built", *encoder)
    whole = (folder / "built" / "dense.faiss").read_bytes()
    (wiki / "part_aa").write_bytes(whole[:300])
    (wiki / "part_ab").write_bytes(whole[300:])
    return folder


def searchrl(folder: Path, *arguments: str) -> str:
    ended = run(python("searchrl.cli", arguments), cwd=folder, timeout_s=300)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def test_every_command_leads_to_the_next(workspace: Path) -> None:
    for split in ("train", "test"):
        prepare = command("README.md", f"data prepare --split {split}")
        printed = searchrl(workspace, *prepare, "--from", "flashrag")
        assert "warning: nq" in printed  # fewer rows than published
    imported = command("docs/retrieval.md", "index import")
    imported[imported.index("--rows") + 1] = str(len(RIVERS))
    searchrl(workspace, *imported)
    audited = searchrl(workspace, *command("README.md", "data audit"))
    assert re.search(r"bamboogle\D+4 .*1\.000", audited)

    planned = searchrl(workspace, *command("README.md", "validate +experiment=nq_hotpotqa"))
    assert "3000 steps of 32 groups x 8" in planned
    trained = searchrl(workspace, *command("README.md", "train +experiment=nq_hotpotqa"), *SMALL)
    assert "step 1/1 " in trained
    assert "Warning" not in trained
    evaluate = command("README.md", "eval +experiment=nq_hotpotqa")
    evaluated = searchrl(
        workspace, *evaluate, *(setting for setting in SMALL if not setting.startswith("eval="))
    )
    assert "exact match beside published results" in evaluated
    summary = json.loads((workspace / "runs" / "table" / "eval" / "summary.json").read_text("utf-8"))
    counts = {part["name"]: part["questions"] for part in summary["parts"] if part["kind"] == "data_source"}
    assert counts == dict.fromkeys(TESTED_ON, len(RIVERS))
    table = (workspace / "runs" / "table" / "eval" / "table.md").read_text("utf-8")
    assert "4 of 14267" in table
